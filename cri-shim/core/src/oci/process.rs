//! What runs: arguments, environment and working directory, from CRI over the image's defaults.

use cri_shim_api::v1::{ContainerConfig, KeyValue};

use super::SpecError;
use super::mounts::clean;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What an image says about its containers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    /// `NAME=value` pairs.
    pub env: Vec<String>,
    /// The program and its fixed arguments.
    pub entrypoint: Vec<String>,
    /// The arguments, or the program where there is no entrypoint.
    pub cmd: Vec<String>,
    /// Where it starts.
    pub working_dir: String,
    /// `user[:group]`, names or numbers.
    pub user: String,
    /// The signal that asks it to stop.
    pub stop_signal: Option<String>,
    /// Paths that are volumes, in order.
    pub volumes: Vec<String>,
}

/// The arguments: CRI's command replaces entrypoint and cmd; CRI's args replace cmd only.
pub fn arguments(config: &ContainerConfig, image: &ImageDefaults) -> Result<Vec<String>, SpecError> {
    let (program, arguments) = match (config.command.is_empty(), config.args.is_empty()) {
        (false, _) => (&config.command, &config.args),
        (true, false) => (&image.entrypoint, &config.args),
        (true, true) => (&image.entrypoint, &image.cmd),
    };
    let all: Vec<String> = program.iter().chain(arguments).cloned().collect();
    if all.iter().any(|word| word.contains('\0')) {
        return Err(SpecError::Invalid { field: "command", problem: "a word holds a zero byte".to_owned() });
    }
    if all.is_empty() { Err(SpecError::NoCommand) } else { Ok(all) }
}

/// Refuses what no environment can hold.
pub fn check_environment(config: &ContainerConfig) -> Result<(), SpecError> {
    for KeyValue { key, value } in &config.envs {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            let problem = format!("{key:?} cannot be the name of a variable, or its value holds a zero byte");
            return Err(SpecError::Invalid { field: "envs", problem });
        }
    }
    Ok(())
}

/// The environment: defaults, then the image's, then CRI's; a later value replaces an earlier one in its place.
pub fn environment(config: &ContainerConfig, image: &ImageDefaults, hostname: &str) -> Vec<String> {
    let mut env = vec![DEFAULT_PATH.to_owned()];
    if !hostname.is_empty() {
        env.push(format!("HOSTNAME={hostname}"));
    }
    if config.tty {
        env.push("TERM=xterm".to_owned());
    }
    let ours = config.envs.iter().map(|KeyValue { key, value }| format!("{key}={value}"));
    for pair in image.env.iter().cloned().chain(ours) {
        set(&mut env, pair);
    }
    env
}

/// Puts a `NAME=value` pair in the place of an older one of that name, or at the end.
pub(super) fn set(env: &mut Vec<String>, pair: String) {
    let name = pair.split('=').next().unwrap_or_default();
    match env.iter_mut().find(|old| old.split('=').next() == Some(name)) {
        Some(old) => *old = pair,
        None => env.push(pair),
    }
}

/// Where the process starts. A relative one counts from the root in an image, and is a mistake in CRI.
pub fn working_dir(config: &ContainerConfig, image: &ImageDefaults) -> Result<String, SpecError> {
    let own = config.working_dir.as_str();
    if own.contains('\0') || (!own.is_empty() && !own.starts_with('/')) {
        let problem = format!("{own:?} is not an absolute path");
        return Err(SpecError::Invalid { field: "working_dir", problem });
    }
    Ok(clean(if own.is_empty() { &image.working_dir } else { own }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    fn image() -> ImageDefaults {
        ImageDefaults {
            entrypoint: strings(&["/entry"]),
            cmd: strings(&["run"]),
            env: strings(&["PATH=/bin", "A=image"]),
            ..ImageDefaults::default()
        }
    }

    #[test]
    fn command_and_args_follow_the_pods_table() {
        let cases: [(&[&str], &[&str], &[&str]); 4] = [
            (&[], &[], &["/entry", "run"]),
            (&["sh"], &[], &["sh"]),
            (&[], &["x"], &["/entry", "x"]),
            (&["sh"], &["x"], &["sh", "x"]),
        ];
        for (command, args, expected) in cases {
            let config = ContainerConfig {
                command: strings(command),
                args: strings(args),
                ..ContainerConfig::default()
            };
            assert_eq!(arguments(&config, &image()).unwrap(), expected, "{command:?} {args:?}");
        }
        let nothing = arguments(&ContainerConfig::default(), &ImageDefaults::default());
        assert!(nothing.unwrap_err().to_string().starts_with("no command specified"));
    }

    #[test]
    fn cri_overrides_the_image_which_overrides_defaults() {
        let envs = vec![
            KeyValue { key: "A".into(), value: "pod".into() },
            KeyValue { key: "B".into(), value: "x=y".into() },
        ];
        let config = ContainerConfig { envs, tty: true, ..ContainerConfig::default() };
        assert_eq!(
            environment(&config, &image(), "web-0"),
            ["PATH=/bin", "HOSTNAME=web-0", "TERM=xterm", "A=pod", "B=x=y"]
        );
    }

    #[test]
    fn where_it_starts() {
        let dir = |own: &str, of_image: &str| {
            let config = ContainerConfig { working_dir: own.to_owned(), ..ContainerConfig::default() };
            let image = ImageDefaults { working_dir: of_image.to_owned(), ..ImageDefaults::default() };
            working_dir(&config, &image)
        };
        assert_eq!(dir("", "").unwrap(), "/");
        assert_eq!(dir("", "app/../data").unwrap(), "/data");
        assert_eq!(dir("/own/", "/app").unwrap(), "/own");
        assert!(dir("own", "/app").unwrap_err().to_string().starts_with("working_dir"));
    }

    #[test]
    fn an_impossible_environment_is_refused() {
        for (key, value) in [("", "x"), ("A=B", "x"), ("A", "\0")] {
            let envs = vec![KeyValue { key: key.into(), value: value.into() }];
            let config = ContainerConfig { envs, ..ContainerConfig::default() };
            assert!(check_environment(&config).unwrap_err().to_string().starts_with("envs"));
        }
    }
}
