//! An IPAM plugin that does what a case tells it and remembers how it was called.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::context::T;

/// Its `type`.
pub(crate) const NAME: &str = "fake-ipam";

const SCRIPT: &str = r#"#!/bin/sh
here=$(dirname "$0")
cat > "$here/input.$CNI_COMMAND"
echo "$CNI_COMMAND id=$CNI_CONTAINERID if=$CNI_IFNAME netns=$CNI_NETNS path=$CNI_PATH" >> "$here/log"
[ -f "$here/$CNI_COMMAND.out" ] && cat "$here/$CNI_COMMAND.out"
[ -f "$here/$CNI_COMMAND.fails" ] && exit 1
exit 0
"#;

/// The plugin, in the case's `CNI_PATH`.
pub(crate) struct Fake {
    dir: PathBuf,
}

impl Fake {
    /// Puts it there; ADD gives an address.
    pub(crate) fn new(t: &T) -> Result<Self> {
        let dir = t.dir().join("bin");
        let file = dir.join(NAME);
        fs::write(&file, SCRIPT)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
        let fake = Self { dir };
        let mut ip = json!({"address": "10.92.0.2/24", "gateway": "10.92.0.1"});
        if t.newest() < "1.0.0" {
            ip["version"] = "4".into();
        }
        let result = json!({
            "cniVersion": t.newest(), "ips": [ip],
            "dns": {"nameservers": ["192.0.2.9"]},
        });
        fake.answers("ADD", &result)?;
        Ok(fake)
    }

    /// The configuration that delegates to it.
    pub(crate) fn config(&self, t: &T) -> Value {
        let mut config = t.config();
        config["ipam"] = json!({"type": NAME, "mark": "kept"});
        config
    }

    /// What a verb prints.
    pub(crate) fn answers(&self, verb: &str, object: &Value) -> Result<()> {
        self.prints(verb, &object.to_string())
    }

    /// What a verb prints, JSON or not.
    pub(crate) fn prints(&self, verb: &str, text: &str) -> Result<()> {
        fs::write(self.dir.join(format!("{verb}.out")), text).context("writing the answer")
    }

    /// A verb fails with this code.
    pub(crate) fn fails(&self, verb: &str, code: u64) -> Result<()> {
        fs::write(self.dir.join(format!("{verb}.fails")), "")?;
        self.answers(verb, &json!({"cniVersion": "1.0.0", "code": code, "msg": "the fake refuses"}))
    }

    /// How often it was called with a verb.
    pub(crate) fn calls(&self, verb: &str) -> usize {
        let start = format!("{verb} ");
        self.log().lines().filter(|line| line.starts_with(&start)).count()
    }

    /// A line per call.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// What was on standard input at the last call of a verb.
    pub(crate) fn input(&self, verb: &str) -> Result<Value> {
        let text = fs::read(self.dir.join(format!("input.{verb}")))
            .with_context(|| format!("{verb} never reached the IPAM plugin"))?;
        serde_json::from_slice(&text).context("the IPAM plugin got no JSON")
    }
}
