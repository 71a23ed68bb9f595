//! What a plugin answered, and how it is judged by the specification's sections "Success" and "Error".

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Exit status and output of one call.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// The call in short, for messages.
    pub(crate) call: String,
    /// Exit status; absent when a signal ended it.
    pub(crate) status: Option<i32>,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
}

/// An error object.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    /// Its number.
    pub(crate) code: u64,
    /// Message and details in one.
    pub(crate) text: String,
    /// The whole object.
    pub(crate) object: Value,
}

impl Answer {
    /// Fails unless the call succeeded; its object, or null when it printed nothing.
    pub(crate) fn ok(&self) -> Result<Value> {
        ensure!(self.status == Some(0), "{} failed: {}", self.call, self.said());
        if self.stdout.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("{} printed no JSON: {}", self.call, self.stdout))
    }

    /// Fails unless the call succeeded and printed nothing.
    pub(crate) fn ok_silent(&self) -> Result<()> {
        let printed = self.ok()?;
        ensure!(printed.is_null(), "{} printed {printed}", self.call);
        Ok(())
    }

    /// Fails unless the call was refused with an error object as the specification wants it.
    pub(crate) fn refused(&self) -> Result<Refusal> {
        match self.status {
            Some(0) => bail!("{} succeeded: {}", self.call, self.said()),
            // 124 and 137: `timeout` ended it.
            Some(124 | 137) | None => bail!("{} did not end by itself: {}", self.call, self.said()),
            Some(_) => {}
        }
        let object: Value = serde_json::from_str(&self.stdout)
            .with_context(|| format!("{}: no error object on standard output: {}", self.call, self.said()))?;
        let code = object["code"].as_u64().with_context(|| format!("{}: no code in {object}", self.call))?;
        let msg = object["msg"].as_str().unwrap_or_default();
        ensure!(!msg.is_empty(), "{}: no msg in {object}", self.call);
        let text = format!("{msg} {}", object["details"].as_str().unwrap_or_default());
        Ok(Refusal { code, text, object })
    }

    /// Fails unless it was refused with one of these codes.
    pub(crate) fn refused_with(&self, codes: &[u64]) -> Result<Refusal> {
        let refusal = self.refused()?;
        ensure!(
            codes.contains(&refusal.code),
            "{}: code {}, expected {codes:?}: {}",
            self.call,
            refusal.code,
            refusal.text
        );
        Ok(refusal)
    }

    /// Fails unless it was refused with a number that the specification allows for what is not in its table.
    pub(crate) fn refused_somehow(&self) -> Result<Refusal> {
        let refusal = self.refused()?;
        let known = matches!(refusal.code, 1..=7 | 11 | 50 | 51 | 100..);
        ensure!(known, "{}: code {} is reserved: {}", self.call, refusal.code, refusal.text);
        Ok(refusal)
    }

    fn said(&self) -> String {
        let cut = |text: &str| {
            let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
            line.chars().take(600).collect::<String>()
        };
        format!("status {:?}: {} {}", self.status, cut(&self.stdout), cut(&self.stderr))
    }
}

impl Refusal {
    /// Fails unless the message holds one of these words.
    pub(crate) fn names(&self, words: &[&str]) -> Result<()> {
        let text = self.text.to_lowercase();
        ensure!(
            words.iter().any(|word| text.contains(&word.to_lowercase())),
            "the message names none of {words:?}: {:?}",
            self.text
        );
        Ok(())
    }
}
