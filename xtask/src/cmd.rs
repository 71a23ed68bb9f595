//! Running other programs: one place that adds the command line and its output to every error.
//!
//! Never goes through a shell, so no argument needs quoting.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// A command with its arguments, run to completion.
pub(crate) struct Cmd {
    inner: Command,
    shown: String,
    input: Option<String>,
}

impl Cmd {
    /// A command found on PATH (or by path), without arguments.
    pub(crate) fn new(program: impl AsRef<std::ffi::OsStr>) -> Self {
        let shown = program.as_ref().to_string_lossy().into_owned();
        Self { inner: Command::new(program), shown, input: None }
    }

    /// Adds arguments.
    pub(crate) fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        for arg in args {
            self.shown.push(' ');
            self.shown.push_str(&arg.as_ref().to_string_lossy());
            self.inner.arg(arg);
        }
        self
    }

    /// Sets the working directory.
    pub(crate) fn dir(mut self, dir: &Path) -> Self {
        self.inner.current_dir(dir);
        self
    }

    /// Sets one environment variable.
    pub(crate) fn env(mut self, key: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.inner.env(key, value);
        self
    }

    /// Gives [`Self::output`] a text to read; short enough for a pipe.
    pub(crate) fn input(mut self, text: String) -> Self {
        self.input = Some(text);
        self
    }

    /// Runs with the caller's stdout and stderr; a status other than 0 is an error.
    pub(crate) fn run(mut self) -> Result<()> {
        let status = self
            .inner
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("cannot start `{}`", self.shown))?;
        if !status.success() {
            bail!("`{}` failed: {status}", self.shown);
        }
        Ok(())
    }

    /// Runs and returns stdout; on failure the error carries stderr.
    pub(crate) fn output(mut self) -> Result<String> {
        let out = match &self.input {
            None => self.inner.stdin(Stdio::null()).output(),
            Some(text) => fed(&mut self.inner, text),
        };
        let out = out.with_context(|| format!("cannot start `{}`", self.shown))?;
        if !out.status.success() {
            let said = String::from_utf8_lossy(&out.stderr);
            bail!("`{}` failed: {}: {}", self.shown, out.status, said.trim());
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// What it prints, while what it says on standard error goes where ours does.
    pub(crate) fn output_with_progress(mut self) -> Result<String> {
        let out = self.inner.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
        let out = out.with_context(|| format!("cannot start `{}`", self.shown))?;
        if !out.status.success() {
            bail!("`{}` failed: {}", self.shown, out.status);
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }
}

fn fed(command: &mut Command, text: &str) -> std::io::Result<std::process::Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(text.as_bytes())?;
    }
    child.wait_with_output()
}

/// The path of `program` on PATH, or in the directories that Debian keeps out of a plain user's PATH.
pub(crate) fn which(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into(), "/usr/local/bin".into()])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Prints `what`, runs `step`, and prints how long it took when that was noticeable.
pub(crate) fn step<T>(what: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("==> {what}");
    let begin = Instant::now();
    let result = step().with_context(|| format!("{what}: failed"))?;
    let took = begin.elapsed();
    if took.as_secs() >= 2 {
        println!("    done in {:.1} s", took.as_secs_f64());
    }
    Ok(result)
}
