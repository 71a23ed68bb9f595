//! Starts the roles of the configuration and ends them in order: controllers first, then the API server, then the store.

use std::{collections::BTreeSet, sync::Arc};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use control_manager::{Controller, ManagerConfig, SigningAuthority};
use control_server::{Server, ServerConfig, pki::render_kubeconfig};
use control_store::{RedbOptions, RedbStore, Store};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{ControlConfig, Role},
    identities::{self, Identities},
};

/// Run until cancelled, or until a role fails.
pub(crate) async fn run(config: ControlConfig, cancel: CancellationToken) -> anyhow::Result<()> {
    if config.runs(Role::Api) {
        run_with_api(config, cancel).await
    } else {
        run_manager_alone(&config, cancel).await
    }
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
    let server = Server::start(settings, &identities.server, Arc::clone(&store))
        .await
        .map_err(|error| name_field(error, "listen"))?;
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
    if about_listen {
        error.context(format!("configuration field {field}"))
    } else {
        error.context("API server")
    }
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
    let (scheduler, controllers) = (config.runs(Role::Scheduler), config.runs(Role::Controllers));
    if !scheduler && !controllers {
        cancel.cancelled().await;
        return Ok(());
    }
    let authority = &identities.server.authority_pem;
    let text = render_kubeconfig("self", endpoint, authority, "manager", &identities.manager);
    let kubeconfig = Kubeconfig::from_yaml(&text).context("make the manager's client configuration")?;
    let manager = ManagerConfig {
        // The API server of this process removes old events itself.
        disabled: BTreeSet::from([Controller::EventTtl]),
        root_ca_pem: Some(authority.clone()),
        signing: Some(SigningAuthority {
            certificate_pem: identities.authority.certificate_pem.clone(),
            key_pem: identities.authority.key_pem.clone(),
        }),
        ..manager_config(config)
    };
    run_manager(kubeconfig, manager, cancel).await
}

/// Run scheduler and controllers against another API server.
async fn run_manager_alone(config: &ControlConfig, cancel: CancellationToken) -> anyhow::Result<()> {
    let path = &config.manager_kubeconfig;
    let kubeconfig = Kubeconfig::read_from(path)
        .with_context(|| format!("configuration field managerKubeconfig: read {}", path.display()))?;
    let manager = ManagerConfig { root_ca_pem: authority_of(&kubeconfig), ..manager_config(config) };
    run_manager(kubeconfig, manager, cancel).await
}

fn manager_config(config: &ControlConfig) -> ManagerConfig {
    ManagerConfig {
        scheduler: config.runs(Role::Scheduler),
        controllers: config.runs(Role::Controllers),
        pod_cidrs: config.pod_ranges(),
        node_mask_v4: config.node_mask_v4,
        node_mask_v6: config.node_mask_v6,
        ..ManagerConfig::default()
    }
}

async fn run_manager(
    kubeconfig: Kubeconfig,
    manager: ManagerConfig,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let client = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .context("read the manager's client configuration")?;
    let client = Client::try_from(client).context("make the manager's client")?;
    control_manager::run(client, manager, cancel).await.context("controllers")
}

/// The authority in a kubeconfig, which the controllers publish to pods.
fn authority_of(kubeconfig: &Kubeconfig) -> Option<String> {
    let cluster = kubeconfig.clusters.first()?.cluster.as_ref()?;
    if let Some(data) = &cluster.certificate_authority_data {
        return String::from_utf8(STANDARD.decode(data).ok()?).ok();
    }
    std::fs::read_to_string(cluster.certificate_authority.as_ref()?).ok()
}
