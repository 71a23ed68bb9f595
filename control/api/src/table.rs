//! `meta.k8s.io/v1` Tables: what `kubectl get` prints.
//!
//! Input: stored objects of one resource and the time. Output: a Table with kubectl's columns, `-o wide` ones with
//! priority 1. The caller sets the table's `metadata` (resourceVersion, continue). Never filters or sorts.

mod cluster;
mod duration;
mod event;
mod network;
mod node;
mod pod;
mod simple;
mod storage;
mod workload;

pub use duration::human_duration;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::{convert, kinds::ResourceInfo, value::text};

/// What each row carries as its `object`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    /// Nothing.
    None,
    /// PartialObjectMetadata.
    Metadata,
    /// The whole object.
    Object,
}

impl Include {
    /// Reads the `includeObject` query parameter; absent means metadata.
    pub fn parse(parameter: Option<&str>) -> Option<Self> {
        match parameter {
            None | Some("" | "Metadata") => Some(Self::Metadata),
            Some("None") => Some(Self::None),
            Some("Object") => Some(Self::Object),
            Some(_) => None,
        }
    }
}

/// One column.
struct Column {
    name: &'static str,
    kind: &'static str,
    format: &'static str,
    priority: u8,
    description: &'static str,
}

/// A column of text.
const fn text_column(name: &'static str, description: &'static str) -> Column {
    Column { name, kind: "string", format: "", priority: 0, description }
}

/// A column of numbers.
const fn number_column(name: &'static str, description: &'static str) -> Column {
    Column { kind: "integer", ..text_column(name, description) }
}

/// A column that only `-o wide` shows.
const fn wide(name: &'static str, description: &'static str) -> Column {
    Column { priority: 1, ..text_column(name, description) }
}

const NAME: Column =
    Column { format: "name", ..text_column("Name", "Name of the object, unique within its namespace.") };
const AGE: Column = text_column("Age", "Time since the object was created.");

/// How one kind is printed.
struct Printer {
    columns: &'static [Column],
    cells: fn(&Value, Timestamp) -> Vec<Value>,
}

fn printer(info: &ResourceInfo) -> Printer {
    match info.kind {
        "Pod" => Printer { columns: pod::COLUMNS, cells: pod::cells },
        "Node" => Printer { columns: node::COLUMNS, cells: node::cells },
        "Deployment" => Printer { columns: workload::DEPLOYMENT, cells: workload::deployment },
        "ReplicaSet" => Printer { columns: workload::REPLICA_SET, cells: workload::replica_set },
        "Service" => Printer { columns: network::SERVICE, cells: network::service },
        "Endpoints" => Printer { columns: network::ENDPOINTS, cells: network::endpoints },
        "EndpointSlice" => Printer { columns: network::SLICE, cells: network::slice },
        "Event" => Printer { columns: event::COLUMNS, cells: event::cells },
        "Namespace" => Printer { columns: simple::NAMESPACE, cells: simple::namespace },
        "ConfigMap" => Printer { columns: simple::CONFIG_MAP, cells: simple::config_map },
        "Secret" => Printer { columns: simple::SECRET, cells: simple::secret },
        "ServiceAccount" => Printer { columns: simple::SERVICE_ACCOUNT, cells: simple::service_account },
        "Lease" => Printer { columns: simple::LEASE, cells: simple::lease },
        "PersistentVolume" => Printer { columns: storage::VOLUME, cells: storage::volume },
        "PersistentVolumeClaim" => Printer { columns: storage::CLAIM, cells: storage::claim },
        "StorageClass" => Printer { columns: storage::CLASS, cells: storage::storage_class },
        "CSIDriver" => Printer { columns: storage::DRIVER, cells: storage::csi_driver },
        "CSINode" => Printer { columns: storage::CSI_NODE, cells: storage::csi_node },
        "CSIStorageCapacity" => Printer { columns: storage::CAPACITY, cells: storage::capacity },
        "VolumeAttachment" => Printer { columns: storage::ATTACHMENT, cells: storage::attachment },
        "VolumeAttributesClass" => {
            Printer { columns: storage::ATTRIBUTES_CLASS, cells: storage::attributes_class }
        }
        "CertificateSigningRequest" => {
            Printer { columns: cluster::CERTIFICATE_REQUEST, cells: cluster::certificate_request }
        }
        "RuntimeClass" => Printer { columns: cluster::RUNTIME_CLASS, cells: cluster::runtime_class },
        "PriorityClass" => Printer { columns: cluster::PRIORITY_CLASS, cells: cluster::priority_class },
        "DeviceClass" | "ResourceClaimTemplate" => {
            Printer { columns: cluster::NAME_AND_AGE, cells: cluster::name_and_age }
        }
        "ResourceClaim" => Printer { columns: cluster::RESOURCE_CLAIM, cells: cluster::resource_claim },
        "ResourceSlice" => Printer { columns: cluster::RESOURCE_SLICE, cells: cluster::resource_slice },
        _ => Printer { columns: simple::ANY, cells: simple::any },
    }
}

/// Renders stored objects as a Table.
pub fn render(info: &ResourceInfo, objects: &[&Value], now: Timestamp, include: Include) -> Value {
    let printer = printer(info);
    let columns: Vec<Value> = printer.columns.iter().map(Column::to_json).collect();
    let rows: Vec<Value> = objects.iter().map(|object| row(info, &printer, object, now, include)).collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {},
        "columnDefinitions": columns,
        "rows": rows,
    })
}

/// The `PartialObjectMetadata` of an object.
pub fn partial_metadata(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

fn row(info: &ResourceInfo, printer: &Printer, object: &Value, now: Timestamp, include: Include) -> Value {
    let shown = match include {
        Include::None => Value::Null,
        Include::Metadata => partial_metadata(object),
        Include::Object => convert::from_stored(info, object.clone()),
    };
    let mut row = json!({ "cells": (printer.cells)(object, now), "object": shown });
    if info.kind == "Pod"
        && let Some(condition) = pod::row_condition(object)
    {
        row["conditions"] = json!([condition]);
    }
    row
}

impl Column {
    fn to_json(&self) -> Value {
        json!({
            "name": self.name,
            "type": self.kind,
            "format": self.format,
            "description": self.description,
            "priority": self.priority,
        })
    }
}

fn name(object: &Value) -> Value {
    text(object, "/metadata/name").into()
}

fn age(object: &Value, now: Timestamp) -> Value {
    since(text(object, "/metadata/creationTimestamp"), now).into()
}

/// Time since a timestamp as text, or `<unknown>`.
fn since(timestamp: &str, now: Timestamp) -> String {
    match timestamp.parse::<Timestamp>() {
        Ok(then) => human_duration(now.as_second() - then.as_second()),
        Err(_) => "<unknown>".to_owned(),
    }
}

/// The text, or `<none>`.
fn or_none(found: &str) -> Value {
    if found.is_empty() { "<none>".into() } else { found.into() }
}

/// The first three of a list, and how many more there are.
fn first_three(items: &[String], empty: &str) -> String {
    const MOST: usize = 3;
    if items.is_empty() {
        return empty.to_owned();
    }
    let shown = items[..items.len().min(MOST)].join(",");
    match items.len().checked_sub(MOST) {
        Some(more) if more > 0 => format!("{shown} + {more} more..."),
        _ => shown,
    }
}

#[cfg(test)]
mod tests;
