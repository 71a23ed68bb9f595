//! The log file: one line per call, what it was for and why it failed.
//!
//! At most [`MAX_SIZE`] bytes and one old file of the same size. A log that cannot be written is no reason
//! to fail a call.

use std::{
    fmt::Write as _,
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use cni_plugins_host::file;
use cni_plugins_types::Version;

use crate::{
    call::{Call, Command, RawCall},
    failure::Failure,
    plugins::Plugin,
};

/// Where the log is unless a configuration says otherwise (`logFile`; empty for none).
pub(crate) const DEFAULT_FILE: &str = "/var/log/keelson/cni.log";
/// Size at which the log is moved aside as `<name>.1`.
const MAX_SIZE: u64 = 1 << 20;

/// The line of this call.
pub(crate) struct Line {
    plugin: Plugin,
    started: Instant,
    command: Option<Command>,
    version: Version,
    file: Option<PathBuf>,
    what: String,
    outcome: String,
}

impl Line {
    /// For a call of which nothing is known yet.
    pub(crate) fn new(plugin: Plugin, started: Instant) -> Self {
        Self {
            plugin,
            started,
            command: None,
            version: Version::default(),
            file: Some(PathBuf::from(DEFAULT_FILE)),
            what: String::new(),
            outcome: "ok".to_owned(),
        }
    }

    /// Notes where to log and what was asked.
    pub(crate) fn read(&mut self, raw: &RawCall) {
        self.command = Some(raw.command());
        self.version = raw.answer_version();
        if let Some(file) = raw.string("logFile") {
            self.file = place(file);
        }
    }

    /// Notes whom it is for.
    pub(crate) fn checked(&mut self, call: &Call) {
        self.what = format!(" network={}", call.network);
        for (key, value) in [("container", &call.container_id), ("interface", &call.ifname)] {
            if !value.is_empty() {
                self.add(key, value);
            }
        }
        if let Some(pod) = call.pod() {
            self.add("pod", &pod);
        }
    }

    /// Notes why it failed.
    pub(crate) fn failed(&mut self, failure: &Failure) {
        self.outcome = format!("failed: {}", failure.to_string().replace('\n', " "));
    }

    /// Version to write an error object in.
    pub(crate) fn version(&self) -> Version {
        self.version
    }

    /// Appends the line. VERSION and STATUS that went well say nothing: they change nothing and are asked
    /// for every few seconds.
    pub(crate) fn write(&self) {
        let idle = matches!(self.command, Some(Command::Version | Command::Status));
        if idle && self.outcome == "ok" {
            return;
        }
        let Some(file) = &self.file else { return };
        let command = self.command.map_or("?", Command::as_str);
        let text = format!(
            "{} {} {command}{} {} us {}\n",
            timestamp(SystemTime::now()),
            self.plugin.name(),
            self.what,
            self.started.elapsed().as_micros(),
            self.outcome
        );
        // Nobody to tell: standard output belongs to the answer.
        drop(append(file, &text));
    }

    fn add(&mut self, key: &str, value: &str) {
        write!(self.what, " {key}={value}").expect("writing to a string cannot fail");
    }
}

/// Where a configuration's `logFile` leads. A relative one is refused, which must not be told in whatever directory the
/// runtime happens to be in.
fn place(file: &str) -> Option<PathBuf> {
    match file {
        "" => None,
        _ if file.starts_with('/') => Some(file.into()),
        _ => Some(DEFAULT_FILE.into()),
    }
}

/// One write to a file opened for appending, so that lines of parallel calls do not mix. A pipe that nobody reads gets no
/// line: no call waits for a reader.
fn append(path: &Path, text: &str) -> io::Result<()> {
    let open = || OpenOptions::new().create(true).append(true).custom_flags(file::NEVER_WAIT).open(path);
    let mut file = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            open()?
        }
        opened => opened?,
    };
    let metadata = file.metadata()?;
    if metadata.is_file() && metadata.len() >= MAX_SIZE {
        let mut old = path.as_os_str().to_owned();
        old.push(".1");
        fs::rename(path, old)?;
        file = open()?;
    }
    file.write_all(text.as_bytes())
}

/// `2026-11-21T17:07:21.123Z`.
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

/// Year, month and day of a day since 1970, by the Gregorian calendar: days are counted from 1 March of
/// year 0, so that leap days come last.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_written_as_people_read_them() {
        let at = |seconds: u64| timestamp(UNIX_EPOCH + Duration::from_millis(seconds * 1000 + 7));
        assert_eq!(at(0), "1970-01-01T00:00:00.007Z");
        assert_eq!(at(951_827_696), "2000-02-29T12:34:56.007Z");
        assert_eq!(at(1_795_280_841), "2026-11-21T17:07:21.007Z");
    }

    #[test]
    fn a_relative_file_is_not_written_to() {
        assert_eq!(place("/x/cni.log"), Some("/x/cni.log".into()));
        assert_eq!(place("cni.log"), Some(DEFAULT_FILE.into()));
        assert_eq!(place(""), None);
    }

    #[test]
    fn a_pipe_does_not_hold_a_call_up() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("log");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert!(append(&pipe, "line\n").is_err());
    }

    #[test]
    fn a_log_stays_small() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("new/cni.log");
        let line = "x".repeat(1 << 16) + "\n";
        for _ in 0..100 {
            append(&file, &line).unwrap();
        }
        let size = |path: &Path| fs::metadata(path).unwrap().len();
        assert!(size(&file) <= MAX_SIZE + (1 << 17));
        assert!(size(&dir.path().join("new/cni.log.1")) <= MAX_SIZE + (1 << 17));
        assert_eq!(fs::read_dir(dir.path().join("new")).unwrap().count(), 2);
    }
}
