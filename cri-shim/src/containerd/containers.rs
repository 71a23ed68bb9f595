//! Container records: id, labels, OCI spec and root file system; not processes (those are tasks).

use std::collections::HashMap;

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest, ListContainersRequest,
    UpdateContainerRequest,
};
use prost::Message;
use prost_types::Any;

use super::error::gone;
use super::options::RuncOptions;
use super::snapshots::SNAPSHOTTER;
use super::{Client, ContainerdError, METADATA_DEADLINE, call};

/// containerd's shim for runc; it groups a pod's containers by the annotation `io.kubernetes.cri.sandbox-id`.
pub const RUNC_SHIM: &str = "io.containerd.runc.v2";
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// A container record to be made.
#[derive(Clone, Debug)]
pub struct NewContainer {
    /// Its id.
    pub id: String,
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// The image reference, for people who look with `ctr`.
    pub image: String,
    /// Key of its writable snapshot; empty when the root file system is none.
    pub snapshot: String,
    /// The OCI runtime specification as JSON.
    pub spec: Vec<u8>,
    /// The shim: a name such as [`RUNC_SHIM`], or the path of one.
    pub shim: String,
    /// The shim's options.
    pub options: RuncOptions,
}

impl Client {
    /// Makes a container record.
    pub async fn create_container(&self, new: NewContainer) -> Result<(), ContainerdError> {
        let id = new.id.clone();
        let container = Container {
            id: new.id,
            labels: new.labels,
            image: new.image,
            runtime: Some(Runtime { name: new.shim, options: Some(new.options.to_any()) }),
            spec: Some(spec_any(new.spec)),
            snapshotter: if new.snapshot.is_empty() { String::new() } else { SNAPSHOTTER.to_owned() },
            snapshot_key: new.snapshot,
            ..Container::default()
        };
        let request = CreateContainerRequest { container: Some(container) };
        call("Containers.Create", &id, METADATA_DEADLINE, self.containers_client().create(request)).await?;
        Ok(())
    }

    /// The record of `id`, when it exists.
    pub async fn container(&self, id: &str) -> Result<Option<Container>, ContainerdError> {
        let request = GetContainerRequest { id: id.to_owned() };
        match call("Containers.Get", id, METADATA_DEADLINE, self.containers_client().get(request)).await {
            Ok(answer) => Ok(answer.container),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Every container record that matches one of `filters` (all, when there is none).
    pub async fn containers(&self, filters: Vec<String>) -> Result<Vec<Container>, ContainerdError> {
        let request = ListContainersRequest { filters };
        let answer =
            call("Containers.List", "", METADATA_DEADLINE, self.containers_client().list(request)).await?;
        Ok(answer.containers)
    }

    /// Replaces the OCI specification that the next task of `id` starts with.
    pub async fn update_container_spec(&self, id: &str, spec: Vec<u8>) -> Result<(), ContainerdError> {
        let request = UpdateContainerRequest {
            container: Some(Container {
                id: id.to_owned(),
                spec: Some(spec_any(spec)),
                ..Container::default()
            }),
            update_mask: Some(prost_types::FieldMask { paths: vec!["spec".to_owned()] }),
        };
        call("Containers.Update", id, METADATA_DEADLINE, self.containers_client().update(request)).await?;
        Ok(())
    }

    /// Deletes the record of `id`; one that is gone is fine.
    pub async fn delete_container(&self, id: &str) -> Result<(), ContainerdError> {
        let request = DeleteContainerRequest { id: id.to_owned() };
        gone(call("Containers.Delete", id, METADATA_DEADLINE, self.containers_client().delete(request)).await)
    }
}

fn spec_any(spec: Vec<u8>) -> Any {
    Any { type_url: SPEC_TYPE.to_owned(), value: spec }
}

impl RuncOptions {
    /// The form containerd carries options in: the full name without the usual `type.googleapis.com/`.
    fn to_any(&self) -> Any {
        Any { type_url: "containerd.runc.v1.Options".to_owned(), value: self.encode_to_vec() }
    }
}
