//! The keelson CNI plugins in one executable; the name it is called by chooses the plugin.
//!
//! Called through a link named `keelson-bridge`, `keelson-ipam` or `keelson-loopback` it is that plugin:
//! `CNI_*` variables and a JSON object on standard input in, a JSON object on standard output out, exit
//! status 1 with an error object on failure. Called as `keelson-cni install DIR` it makes those links.
//! It keeps nothing running and needs no other part of keelson.

mod call;
mod failure;
mod install;
mod plugins;

use std::{io::Write, path::Path, process::ExitCode};

use serde_json::Value;

use crate::{
    call::{Call, Command},
    failure::Failure,
    plugins::Plugin,
};

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let own_name = args.next().unwrap_or_default();
    let name = Path::new(&own_name).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let outcome = match Plugin::named(&name) {
        Some(plugin) => run_plugin(plugin),
        None => return install::main(&args.collect::<Vec<_>>()),
    };
    let (output, code) = match outcome {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(failure) => (Some(failure.to_value()), ExitCode::FAILURE),
    };
    let Some(output) = output else { return code };
    match writeln!(std::io::stdout(), "{output}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Reads the call, runs it, and returns what belongs on standard output.
fn run_plugin(plugin: Plugin) -> Result<Option<Value>, Failure> {
    let call = Call::read()?;
    if call.command == Command::Version {
        return Ok(Some(call::version_answer()));
    }
    // One thread: a plugin lives for milliseconds and mostly waits for single netlink answers.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::io("start the runtime", &error))?;
    let result = runtime.block_on(plugin.run(&call))?;
    Ok(result.map(|result| result.to_value(call.cni_version)))
}
