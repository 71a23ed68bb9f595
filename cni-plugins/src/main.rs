//! The keelson CNI plugins in one executable; the name it is called by chooses the plugin.
//!
//! Called through a link named `keelson-bridge`, `keelson-ipam` and so on it is that plugin: `CNI_*`
//! variables and a JSON object on standard input in, a JSON object on standard output out, exit status 1
//! with an error object on failure. Called as `keelson-cni` it makes those links, lists what is held and
//! takes everything away ([`manage`]). It keeps nothing running and needs no other part of keelson.
//!
//! One thread, blocking calls: a plugin lives for milliseconds and waits for single answers of the kernel.

mod call;
mod failure;
mod log;
mod manage;
mod plugins;
mod state;

use std::{io::Write, path::Path, process::ExitCode, time::Instant};

use cni_plugins_types::Version;
use serde_json::Value;

use crate::{
    call::{Command, RawCall},
    failure::Failure,
    plugins::Plugin,
};

fn main() -> ExitCode {
    let started = Instant::now();
    let mut args = std::env::args_os();
    let own_name = args.next().unwrap_or_default();
    let name = Path::new(&own_name).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let Some(plugin) = Plugin::named(&name) else {
        let args: Vec<_> = args.collect();
        // A runtime that calls it by a name that is no plugin's understands nothing but an error object.
        let is_call = args.is_empty() && std::env::var_os("CNI_COMMAND").is_some();
        return if is_call { refuse(&name) } else { manage::main(&args) };
    };
    let mut line = log::Line::new(plugin, started);
    let (output, code) = match run_plugin(plugin, &mut line) {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(failure) => {
            line.failed(&failure);
            (Some(failure.to_value(line.version())), ExitCode::FAILURE)
        }
    };
    let written = output.map_or(Ok(()), |output| writeln!(std::io::stdout(), "{output}"));
    line.write();
    if written.is_ok() { code } else { ExitCode::FAILURE }
}

fn refuse(name: &str) -> ExitCode {
    let known = Plugin::ALL.map(Plugin::name).join(", ");
    let failure = Failure::config(format!("type: this executable has no plugin {name:?}, but {known}"));
    let object = failure.to_value(Version::default());
    // A failure either way.
    drop(writeln!(std::io::stdout(), "{object}"));
    ExitCode::FAILURE
}

/// Reads the call, runs it, and returns what belongs on standard output.
fn run_plugin(plugin: Plugin, line: &mut log::Line) -> Result<Option<Value>, Failure> {
    let raw = RawCall::read()?;
    line.read(&raw);
    if raw.command() == Command::Version {
        return Ok(Some(call::version_answer(raw.answer_version())));
    }
    let call = raw.check()?;
    line.checked(&call);
    let result = plugin.run(&call)?;
    Ok(result.map(|result| result.to_value(call.cni_version)))
}
