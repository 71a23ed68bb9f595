//! The last word on the error stream: how the process ended, as a metav1.Status or, for older clients, as plain text.
//!
//! Forms as written by the kubelet, `k8s.io/kubelet/pkg/cri/streaming/remotecommand`.

use serde_json::json;

use crate::runtime::RuntimeError;

/// How an exec or attach ended: the exit code, or what went wrong on the way.
pub type Outcome = Result<u32, RuntimeError>;

/// The status as protocol versions 4 and 5 want it.
pub fn json(outcome: &Outcome, doing: &str) -> Vec<u8> {
    let status = match outcome {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => json_exit(*code, &exit_text(*code)),
        Err(RuntimeError { message, exit_code: Some(code) }) => json_exit(*code, &not_run(*code, message)),
        Err(error) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("Internal error occurred: {doing}: {error}"),
            "reason": "InternalError",
            "details": {"causes": [{"message": format!("{doing}: {error}")}]},
            "code": 500,
        }),
    };
    status.to_string().into_bytes()
}

fn json_exit(code: u32, message: &str) -> serde_json::Value {
    json!({
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
    })
}

/// The status as protocol versions 1 to 3 want it; empty for success.
pub fn text(outcome: &Outcome, doing: &str) -> Vec<u8> {
    match outcome {
        Ok(0) => String::new(),
        Ok(code) => exit_text(*code),
        Err(RuntimeError { message, exit_code: Some(code) }) => not_run(*code, message),
        Err(error) => format!("Internal error occurred: {doing}: {error}"),
    }
    .into_bytes()
}

fn exit_text(code: u32) -> String {
    format!("command terminated with non-zero exit code: exit status {code}")
}

fn not_run(code: u32, message: &str) -> String {
    format!("{}: {message}", exit_text(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_find_the_exit_code() {
        let status: serde_json::Value =
            serde_json::from_slice(&json(&Ok(3), "error executing")).expect("JSON");
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        assert_eq!(json(&Ok(0), ""), br#"{"metadata":{},"status":"Success"}"#);
        assert!(text(&Ok(0), "").is_empty());
    }

    #[test]
    fn failures_carry_their_cause() {
        let outcome = Err(RuntimeError::new("no such container"));
        let status: serde_json::Value =
            serde_json::from_slice(&json(&outcome, "error executing command in container")).expect("JSON");
        assert_eq!(
            status["message"],
            "Internal error occurred: error executing command in container: no such container"
        );
        assert_eq!(status["code"], 500);
    }

    #[test]
    fn a_command_that_cannot_be_run_is_named_beside_its_code() {
        let message = r#"exec: "nope": executable file not found in $PATH"#.to_owned();
        let outcome = Err(RuntimeError { message, exit_code: Some(127) });
        let status: serde_json::Value = serde_json::from_slice(&json(&outcome, "")).expect("JSON");
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "127");
        for text in [status["message"].as_str().unwrap_or_default().to_owned(), text_of(&outcome)] {
            assert!(text.contains("exit status 127") && text.contains(r#""nope""#), "{text}");
        }
    }

    fn text_of(outcome: &Outcome) -> String {
        String::from_utf8(text(outcome, "")).expect("text")
    }
}
