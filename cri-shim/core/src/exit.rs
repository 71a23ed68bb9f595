//! Why a container ended, in the words the kubelet passes on.

use crate::record::Ending;

/// Ended with exit code 0.
pub const COMPLETED: &str = "Completed";
/// Ended with another exit code.
pub const ERROR: &str = "Error";
/// The kernel ended it because its memory limit was reached.
pub const OOM_KILLED: &str = "OOMKilled";
/// It could not be started: no such command, bad working directory, a mount that fails.
pub const START_ERROR: &str = "StartError";
/// It ended while nobody looked and nothing is left that knows how.
pub const UNKNOWN: &str = "Unknown";
/// Exit code of a container that could not be started.
pub const START_ERROR_CODE: i32 = 128;
/// Exit code of a container whose end nobody knows.
pub const UNKNOWN_CODE: i32 = 255;

/// A first process that ran and ended.
pub fn ran(status: u32, at: i64, out_of_memory: bool) -> Ending {
    let code = i32::try_from(status).unwrap_or(UNKNOWN_CODE);
    let reason = match code {
        _ if out_of_memory => OOM_KILLED,
        0 => COMPLETED,
        _ => ERROR,
    };
    Ending { at, code, reason: reason.to_owned(), message: String::new() }
}

/// A start that failed, with the runtime's words.
pub fn start_failed(message: &str, at: i64) -> Ending {
    Ending { at, code: START_ERROR_CODE, reason: START_ERROR.to_owned(), message: message.to_owned() }
}

/// An end that nobody saw.
pub fn unseen(at: i64) -> Ending {
    let message = "the container's process and its shim were gone".to_owned();
    Ending { at, code: UNKNOWN_CODE, reason: UNKNOWN.to_owned(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_what_the_kubelet_shows() {
        assert_eq!(ran(0, 1, false).reason, "Completed");
        assert_eq!(ran(1, 1, false).reason, "Error");
        let killed = ran(137, 1, true);
        assert_eq!((killed.code, killed.reason.as_str()), (137, "OOMKilled"));
        assert_eq!(start_failed("no such file", 1).code, 128);
    }
}
