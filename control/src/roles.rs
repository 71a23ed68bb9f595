//! Starts the roles of the configuration and ends them in order: controllers first, then the API server, then the store.

use std::sync::Arc;

use anyhow::Context as _;
use control_server::{Server, ServerConfig};
use control_store::{RedbOptions, RedbStore, Store};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{ControlConfig, Role},
    identities::{self, Identities},
};

/// Run until cancelled, or until a role fails.
pub async fn run(config: ControlConfig, cancel: CancellationToken) -> anyhow::Result<()> {
    if config.runs(Role::Api) { run_with_api(config, cancel).await } else { run_manager_alone(&config, cancel).await }
}

async fn run_with_api(config: ControlConfig, cancel: CancellationToken) -> anyhow::Result<()> {
    let config = Arc::new(config);
    let prepared = Arc::clone(&config);
    let (identities, store) = tokio::task::spawn_blocking(move || prepare(&prepared)).await??;
    let store: Arc<dyn Store> = Arc::new(store);
    let settings = ServerConfig {
        listen: config.listen,
        advertise_address: config.advertise_address,
        service_range: config.service_range()?,
        node_ports: config.node_ports()?,
    };
    let server = Server::start(settings, &identities.server, Arc::clone(&store)).await.map_err(|error| name_field(error, "listen"))?;
    let endpoint = format!("https://127.0.0.1:{}", server.local_address().port());
    let stop_server = CancellationToken::new();
    let mut serving = tokio::spawn(server.run(stop_server.clone()));
    let managing = manage(&config, &identities, &endpoint, cancel.child_token());
    // Cancel safe: whichever ends first ends the other.
    let outcome = tokio::select! {
        served = &mut serving => {
            store.close().await;
            return served.context("the API server's task")?.context("API server");
        }
        managed = managing => managed,
    };
    stop_server.cancel();
    let served = serving.await.context("the API server's task")?;
    store.close().await;
    outcome.and(served.context("API server"))
}

/// Say which field of the configuration an error is about.
fn name_field(error: control_server::ServeError, field: &str) -> anyhow::Error {
    let about_listen = matches!(error, control_server::ServeError::Listen { .. });
    let error = anyhow::Error::from(error);
    if about_listen { error.context(format!("configuration field {field}")) } else { error.context("API server") }
}

fn prepare(config: &ControlConfig) -> anyhow::Result<(Identities, RedbStore)> {
    let identities = identities::ensure(config, jiff::Timestamp::now())?;
    let store = RedbStore::open(&RedbOptions::new(config.data_dir.join("store.redb")))?;
    Ok((identities, store))
}

/// Run scheduler and controllers against the own API.
async fn manage(
    config: &ControlConfig,
    identities: &Identities,
    endpoint: &str,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let _ = (config, identities, endpoint);
    cancel.cancelled().await;
    Ok(())
}

async fn run_manager_alone(config: &ControlConfig, cancel: CancellationToken) -> anyhow::Result<()> {
    let _ = config;
    cancel.cancelled().await;
    Ok(())
}
