//! The command line that containerd starts a shim with (Go's flags: one dash or two, value after a space or `=`).

use std::path::PathBuf;

/// What was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the container.
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// The bundle, where it is not the working directory.
    pub bundle: Option<PathBuf>,
    /// Print the version and end.
    pub version: bool,
    /// Print what the runtime is and end.
    pub info: bool,
    /// What to do; empty for serving.
    pub action: String,
    /// What follows the action.
    pub rest: Vec<String>,
}

impl Options {
    /// Reads the arguments after the program's name.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut options = Self::default();
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                options.action = argument;
                options.rest = arguments.collect();
                return Ok(options);
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value = || {
                inline.clone().or_else(|| arguments.next()).ok_or_else(|| format!("-{name} needs a value"))
            };
            match name {
                "namespace" => options.namespace = value()?,
                "id" => options.id = value()?,
                "address" => options.address = value()?,
                "bundle" => options.bundle = Some(value()?.into()),
                // Events go to containerd's ttrpc socket, so nobody runs its `publish`; sockets have a fixed folder.
                "publish-binary" | "socket" | "socket-dir" => drop(value()?),
                "debug" => {}
                "v" | "version" => options.version = true,
                "info" => options.info = true,
                _ => return Err(format!("unknown flag -{name}")),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn flags_as_containerd_writes_them() {
        let options =
            parse("-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id a1 -bundle /b delete")
                .unwrap();
        assert_eq!((options.namespace.as_str(), options.id.as_str()), ("k8s.io", "a1"));
        assert_eq!((options.address.as_str(), options.action.as_str()), ("/run/c.sock", "delete"));
        assert_eq!(options.bundle, Some("/b".into()));
        assert_eq!(parse("--id=x start").unwrap().id, "x");
        assert!(parse("-v").unwrap().version);
        assert_eq!(parse("sandbox --root /x").unwrap().rest, ["--root", "/x"]);
        assert_eq!(parse("-nope").unwrap_err(), "unknown flag -nope");
        assert_eq!(parse("-id").unwrap_err(), "-id needs a value");
    }
}
