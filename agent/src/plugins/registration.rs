//! The registration API v1: what a plugin's registration socket is asked and told.
//!
//! Facts: k8s.io/kubelet `pkg/apis/pluginregistration/v1`. Field numbers are the contract.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use prost::Message;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{debug, info, warn};

use super::socket::{channel, unary};

/// The plugin is asked for its name.
pub const GET_INFO: &str = "/pluginregistration.Registration/GetInfo";
/// The plugin is told whether it is registered.
pub const NOTIFY: &str = "/pluginregistration.Registration/NotifyRegistrationStatus";
/// The service's name.
pub const SERVICE: &str = "pluginregistration.Registration";

/// Deadline of a call to the registration socket.
const DEADLINE: Duration = Duration::from_secs(10);
/// Pauses between attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// `InfoRequest`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct InfoRequest {}

/// `PluginInfo`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PluginInfo {
    /// `CSIPlugin`, `DevicePlugin`, `DRAPlugin`.
    #[prost(string, tag = "1")]
    pub kind: String,
    /// Unique name.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Socket of the plugin's services; empty: the registration socket itself.
    #[prost(string, tag = "3")]
    pub endpoint: String,
    /// Versions of its API.
    #[prost(string, repeated, tag = "4")]
    pub versions: Vec<String>,
}

/// `RegistrationStatus`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RegistrationStatus {
    /// It is.
    #[prost(bool, tag = "1")]
    pub registered: bool,
    /// Why it is not.
    #[prost(string, tag = "2")]
    pub error: String,
}

/// `RegistrationStatusResponse`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct RegistrationStatusResponse {}

/// A plugin that wants to be registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugin {
    /// Its name.
    pub name: String,
    /// Where its services are.
    pub endpoint: PathBuf,
    /// Versions of its API.
    pub versions: Vec<String>,
    /// Where it was asked for its name: another socket is another plugin.
    pub socket: PathBuf,
}

/// Takes plugins of one type in.
pub trait PluginHandler: Send + Sync + 'static {
    /// The type, as plugins tell it.
    fn kind(&self) -> &'static str;

    /// Takes the plugin in, or says why not: the plugin is told, and asked again later.
    fn register<'a>(&'a self, plugin: &'a Plugin) -> BoxFuture<'a, Result<(), String>>;

    /// The plugin's registration socket has gone.
    fn deregister<'a>(&'a self, plugin: &'a Plugin) -> BoxFuture<'a, ()>;
}

/// The handlers of an agent, at most one for each type.
pub type Handlers = Arc<Vec<Arc<dyn PluginHandler>>>;

/// Registers the plugin behind `socket`, however often that takes, until `gone`; then takes it out, unless another one
/// comes in its place.
pub(super) async fn follow(socket: PathBuf, handlers: Handlers, ends: Ends) {
    // Cancel-safe: what a dropped registration left is what the next one, or none, makes of it.
    let registered = tokio::select! {
        () = ends.all.cancelled() => return,
        () = ends.replaced.cancelled() => return,
        () = ends.gone.cancelled() => return,
        registered = register(&socket, &handlers) => registered,
    };
    let (handler, plugin) = registered;
    tokio::select! {
        () = ends.all.cancelled() => {}
        () = ends.replaced.cancelled() => {}
        () = ends.gone.cancelled() => {
            info!(plugin = %plugin.name, kind = handler.kind(), "plugin has gone");
            handler.deregister(&plugin).await;
        }
    }
}

/// Why a plugin is followed no more.
#[derive(Debug, Clone)]
pub(super) struct Ends {
    /// The agent ends.
    pub(super) all: CancellationToken,
    /// The socket was removed.
    pub(super) gone: CancellationToken,
    /// Another socket has its name.
    pub(super) replaced: CancellationToken,
}

async fn register(socket: &Path, handlers: &Handlers) -> (Arc<dyn PluginHandler>, Plugin) {
    let mut pause = FIRST_PAUSE;
    let mut told = String::new();
    loop {
        match try_register(socket, handlers).await {
            Ok((handler, plugin)) => {
                info!(plugin = %plugin.name, kind = handler.kind(), endpoint = %plugin.endpoint.display(),
                    "plugin registered");
                return (handler, plugin);
            }
            Err(problem) if problem == told => {
                debug!(socket = %socket.display(), %problem, "plugin not registered");
            }
            Err(problem) => {
                warn!(socket = %socket.display(), %problem, "plugin not registered");
                told = problem;
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn try_register(
    socket: &Path,
    handlers: &Handlers,
) -> Result<(Arc<dyn PluginHandler>, Plugin), String> {
    let channel = channel(socket.to_owned());
    let asked: Result<PluginInfo, Status> = unary(&channel, GET_INFO, InfoRequest {}, DEADLINE).await;
    let info = asked.map_err(|status| format!("GetInfo failed: {}", status.message()))?;
    let handler = handlers.iter().find(|handler| handler.kind() == info.kind);
    let outcome = match handler {
        Some(handler) => {
            let endpoint =
                if info.endpoint.is_empty() { socket.to_owned() } else { PathBuf::from(&info.endpoint) };
            let plugin =
                Plugin { name: info.name, endpoint, versions: info.versions, socket: socket.to_owned() };
            handler.register(&plugin).await.map(|()| (Arc::clone(handler), plugin))
        }
        None => Err(format!(
            "no handler registered for plugin type: {} at socket {}",
            info.kind,
            socket.display()
        )),
    };
    let status = RegistrationStatus {
        registered: outcome.is_ok(),
        error: outcome.as_ref().err().cloned().unwrap_or_default(),
    };
    let answer: Result<RegistrationStatusResponse, Status> = unary(&channel, NOTIFY, status, DEADLINE).await;
    if let Err(status) = answer {
        // Registered is registered; a plugin that cannot be told ends or asks anew.
        warn!(socket = %socket.display(), problem = status.message(), "plugin cannot be told of its registration");
    }
    outcome
}
