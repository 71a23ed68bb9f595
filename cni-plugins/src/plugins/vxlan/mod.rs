//! `keelson-vxlan`: attaches a pod to the network between nodes. A main plugin.
//!
//! The agent keeps tunnel, routes and neighbours, and leaves in a file what pods need: this node's ranges, the MTU, whether
//! it is ready ([`cni_plugins_types::overlay`]). This plugin makes of it the configuration of [`super::bridge`] (or of
//! another plugin) and has that do the work. What it was called with is recorded, so that CHECK, DEL and GC undo and compare
//! the same, also after the state has changed or gone.

mod config;

use std::time::Duration;

use cni_plugins_host::{invoke, netlink::Netlink};
use cni_plugins_types::{CniResult, ErrorCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::config::VxlanConfig;
use super::{Plugin, bridge};
use crate::{
    call::{Attachment, Call, Command},
    failure::Failure,
    state::StateDir,
};

/// Directory of the records.
const PLUGIN: &str = "vxlan";
/// Limit for an executed delegate and what it calls itself.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a pod was attached with.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    /// The delegate's object.
    config: Value,
}

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    let config = VxlanConfig::of(call)?;
    let records = StateDir::of(call, PLUGIN)?;
    match call.command {
        Command::Add => add(call, &config, &records).map(Some),
        Command::Del => del(call, &config, &records).map(|()| None),
        Command::Check => check(call, &config, &records).map(|()| None),
        Command::Gc => gc(call, &config, &records).map(|()| None),
        Command::Status => status(call, &config).map(|()| None),
        Command::Version => Ok(None),
    }
}

fn add(call: &Call, config: &VxlanConfig, records: &StateDir) -> Result<CniResult, Failure> {
    let state = config.state()?;
    let object = config.delegated(call, Some(&state))?;
    if !config.is_ours() {
        // Before anything is recorded: what cannot be called has left nothing to take back.
        invoke::find_plugin(&call.path, config.kind()).map_err(|_not_found| no_plugin(config.kind()))?;
    }
    let attachment = Attachment::of(call);
    // A second ADD of the same attachment is refused by the delegate, and must not cost the first one its record.
    let before: Option<Record> = records.read(&call.network, &attachment)?;
    records.write(call, &Record { config: lasting(&object) })?;
    let failure = match execute(call, Command::Add, &attachment, &object) {
        Ok(Some(result)) => return Ok(result),
        Ok(None) => Failure::new(ErrorCode::Decode, format!("delegate: {} gave no result", config.kind())),
        Err(failure) => failure,
    };
    let mut left = Vec::new();
    // Ours has taken back what it did.
    if before.is_none() && !config.is_ours() {
        let undone = execute(call, Command::Del, &attachment, &object);
        left.extend(undone.err().map(|error| format!("detach by {}: {error}", config.kind())));
    }
    let recorded = match &before {
        Some(before) => records.write(call, before),
        // What could not be undone is told by it when DEL comes.
        None if !left.is_empty() => Ok(()),
        None => records.remove(&call.network, &attachment),
    };
    left.extend(recorded.err().map(|error| error.to_string()));
    Err(failure.with_undo_failures(&left))
}

/// The record goes last, so that a DEL that failed can be repeated.
fn del(call: &Call, config: &VxlanConfig, records: &StateDir) -> Result<(), Failure> {
    let attachment = Attachment::of(call);
    let object = attached_with(call, config, records, &attachment)?;
    execute(call, Command::Del, &attachment, &object)?;
    records.remove(&call.network, &attachment)
}

fn check(call: &Call, config: &VxlanConfig, records: &StateDir) -> Result<(), Failure> {
    call.require_prev_result()?;
    let attachment = Attachment::of(call);
    let object = attached_with(call, config, records, &attachment)?;
    if let Ok(state) = config.state()
        && let Some(lost) = missing_device(state.device.as_deref())?
    {
        return Err(Failure::different(lost));
    }
    execute(call, Command::Check, &attachment, &object).map(|_| ())
}

fn gc(call: &Call, config: &VxlanConfig, records: &StateDir) -> Result<(), Failure> {
    let valid = call.valid_attachments()?;
    let nobody = Attachment { container_id: String::new(), ifname: String::new() };
    let mut failures = Vec::new();
    let stale = records.list(&call.network)?.into_iter().filter(|found| !valid.contains(found));
    let stale: Vec<Attachment> = stale.collect();
    for attachment in &stale {
        // Ours collects everything of the network in one go, below; others may not know GC.
        let record: Option<Record> = records.read(&call.network, attachment)?;
        let foreign = record.filter(|record| record.config["type"] != Plugin::Bridge.name());
        if let Some(record) = foreign {
            failures.extend(execute(call, Command::Del, attachment, &record.config).err());
        }
    }
    let state = config.state().ok();
    let object = config.delegated(call, state.as_ref())?;
    failures.extend(execute(call, Command::Gc, &nobody, &object).err());
    if let Some(first) = failures.into_iter().next() {
        return Err(first);
    }
    stale.iter().try_for_each(|attachment| records.remove(&call.network, attachment))
}

fn status(call: &Call, config: &VxlanConfig) -> Result<(), Failure> {
    let state = config.state().map_err(|failure| failure.with_code(ErrorCode::NotAvailable))?;
    if let Some(lost) = missing_device(state.device.as_deref())? {
        return Err(Failure::new(ErrorCode::LimitedConnectivity, lost));
    }
    let object = config.delegated(call, Some(&state))?;
    let nobody = Attachment { container_id: String::new(), ifname: String::new() };
    execute(call, Command::Status, &nobody, &object).map(|_| ())
}

/// What the pod was attached with; without a record what it would be attached with now.
fn attached_with(
    call: &Call,
    config: &VxlanConfig,
    records: &StateDir,
    attachment: &Attachment,
) -> Result<Value, Failure> {
    let Some(record) = records.read::<Record>(&call.network, attachment)? else {
        return config.delegated(call, config.state().ok().as_ref());
    };
    let mut object = record.config;
    // Each call has its own.
    for key in ["cniVersion", "prevResult", "runtimeConfig"] {
        if let Some(value) = call.config.get(key) {
            object[key] = value.clone();
        }
    }
    Ok(object)
}

/// The part of a delegate's object that later calls need.
fn lasting(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(object) = object.as_object_mut() {
        object.remove("prevResult");
    }
    object
}

/// What to say of a tunnel that is gone; nothing when it is there, or the mode has none.
fn missing_device(name: Option<&str>) -> Result<Option<String>, Failure> {
    let Some(name) = name else { return Ok(None) };
    let link = Netlink::open()?.link(name)?;
    Ok(match link {
        None => Some(format!("the tunnel device {name} is missing")),
        Some(link) if !link.up => Some(format!("the tunnel device {name} is down")),
        Some(_) => None,
    })
}

/// Has the delegate carry out a command: ours in this process, others as executables.
fn execute(
    call: &Call,
    command: Command,
    attachment: &Attachment,
    object: &Value,
) -> Result<Option<CniResult>, Failure> {
    let kind = object["type"].as_str().unwrap_or_default();
    if kind == Plugin::Bridge.name() {
        return bridge::run(&Call {
            command,
            container_id: attachment.container_id.clone(),
            ifname: attachment.ifname.clone(),
            config: object.clone(),
            ..call.clone()
        });
    }
    let mut environment = Vec::new();
    if !attachment.container_id.is_empty() {
        environment.push(("CNI_CONTAINERID", attachment.container_id.as_str()));
        environment.push(("CNI_IFNAME", attachment.ifname.as_str()));
    }
    let output = invoke::delegate(&call.path, kind, command.as_str(), object, &environment, DEADLINE);
    let output = match output {
        Err(invoke::PluginError::NotFound { .. }) => {
            return Err(no_plugin(kind));
        }
        output => output.map_err(|error| Failure::of_plugin("delegate", kind, error))?,
    };
    let Some(value) = output.filter(|_| command == Command::Add) else { return Ok(None) };
    CniResult::from_value(value, call.cni_version).map(Some).map_err(|error| {
        Failure::new(ErrorCode::Decode, format!("delegate: {kind} gave no usable result: {error}"))
    })
}

fn no_plugin(kind: &str) -> Failure {
    Failure::config(format!("delegate.type: no plugin {kind:?} in CNI_PATH"))
}
