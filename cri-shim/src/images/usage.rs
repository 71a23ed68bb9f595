//! How much of the disk images and containers' writable layers take, as ImageFsInfo reports it.
//!
//! Committed snapshots never change, so each is measured once; active ones are measured again after [`FRESH`]. One
//! measurement runs at a time and others wait for it, because an active snapshot's costs a walk over its files.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{Kind, ListSnapshotsRequest, UsageRequest};
use tokio::sync::Mutex;
use tonic::Code;

use super::session::{CALL_DEADLINE, CallError, Session, allow, call, failed};

/// How long a measurement of an active snapshot is good.
const FRESH: Duration = Duration::from_secs(30);

/// The snapshotter's directory and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Directory that holds the snapshots.
    pub mountpoint: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// Measures one snapshotter.
pub struct Meter {
    session: Session,
    snapshotter: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    mountpoint: Option<String>,
    measured: HashMap<String, Measured>,
}

#[derive(Clone, Copy)]
struct Measured {
    bytes: u64,
    inodes: u64,
    committed: bool,
    at: Instant,
}

impl Meter {
    /// A meter that has measured nothing yet.
    pub fn new(session: Session, snapshotter: &str) -> Self {
        Self { session, snapshotter: snapshotter.to_owned(), state: Mutex::default() }
    }

    /// The usage now, active snapshots up to [`FRESH`] old.
    pub async fn usage(&self) -> Result<Usage, CallError> {
        let mut state = self.state.lock().await;
        let mountpoint = match &state.mountpoint {
            Some(known) => known.clone(),
            None => state.mountpoint.insert(self.mountpoint().await?).clone(),
        };
        let mut measured = HashMap::new();
        for (name, committed) in self.snapshots().await? {
            let known = state.measured.get(&name).copied();
            let good = known
                .filter(|known| known.committed == committed && (committed || known.at.elapsed() < FRESH));
            let now = match good {
                Some(known) => Some(known),
                None => self.measure(&name, committed).await?,
            };
            measured.extend(now.map(|now| (name, now)));
        }
        let bytes = measured.values().map(|one| one.bytes).sum();
        let inodes = measured.values().map(|one| one.inodes).sum();
        state.measured = measured;
        Ok(Usage { mountpoint, bytes, inodes })
    }

    async fn snapshots(&self) -> Result<Vec<(String, bool)>, CallError> {
        const STEP: &str = "list snapshots of";
        let message =
            ListSnapshotsRequest { snapshotter: self.snapshotter.clone(), ..ListSnapshotsRequest::default() };
        let mut client = SnapshotsClient::new(self.session.channel());
        let listing = client.list(self.session.request(message, CALL_DEADLINE));
        let mut stream = call(STEP, &self.snapshotter, listing).await?;
        let mut all = Vec::new();
        while let Some(part) =
            stream.message().await.map_err(|status| failed(STEP, &self.snapshotter, status))?
        {
            all.extend(
                part.info.into_iter().map(|info| (info.name, info.kind == i32::from(Kind::Committed))),
            );
        }
        Ok(all)
    }

    /// `None` for a snapshot that went away meanwhile.
    async fn measure(&self, name: &str, committed: bool) -> Result<Option<Measured>, CallError> {
        let message = UsageRequest { snapshotter: self.snapshotter.clone(), key: name.to_owned() };
        let mut client = SnapshotsClient::new(self.session.channel());
        let usage =
            call("measure snapshot", name, client.usage(self.session.request(message, CALL_DEADLINE))).await;
        let positive = |number: i64| u64::try_from(number).unwrap_or(0);
        Ok(allow(usage, Code::NotFound)?.map(|usage| Measured {
            bytes: positive(usage.size),
            inodes: positive(usage.inodes),
            committed,
            at: Instant::now(),
        }))
    }

    async fn mountpoint(&self) -> Result<String, CallError> {
        let filters = vec![format!("type==io.containerd.snapshotter.v1,id=={}", self.snapshotter)];
        let mut client = IntrospectionClient::new(self.session.channel());
        let request = self.session.request(PluginsRequest { filters }, CALL_DEADLINE);
        let answer = call("look up snapshotter", &self.snapshotter, client.plugins(request)).await?;
        let root = answer.plugins.into_iter().find_map(|plugin| plugin.exports.get("root").cloned());
        root.ok_or_else(|| {
            let status = tonic::Status::not_found("containerd does not say where it keeps its snapshots");
            failed("look up snapshotter", &self.snapshotter, status)
        })
    }
}
