//! Runs a network's plugin chain, as the runtime's half of the CNI specification.
//!
//! Input: a [`NetworkConfigList`] (see [`load`]) and [`RuntimeArgs`]. Output: the chain's
//! [`CniResult`]. ADD runs the plugins in order, hands each the result before it, deletes what was
//! made when one fails, and caches the final result; DEL and CHECK run from that cache, DEL backwards.
//! Every plugin call has a deadline at which its process group is killed.
//!
//! Calls for one container must not overlap; calls for different containers may. Nothing here touches
//! interfaces or addresses itself.

mod cache;
mod delegate;
mod exec;
mod load;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use cni_plugins_types::{
    CniResult, NetworkConfigList, PluginConfig,
    config::{ConfigError, is_interface_name, is_name},
};
use serde_json::{Map, Value, json};

pub use self::{
    cache::CachedAttachment,
    delegate::delegate,
    exec::{PluginError, find_plugin},
    load::{LoadError, load},
};

/// Where plugins and cached results are, and how long one plugin call may take.
#[derive(Debug, Clone)]
pub struct Invoker {
    /// Directories searched for executables, in order (`CNI_PATH`).
    pub bin_dirs: Vec<PathBuf>,
    /// Directory of cached results; files are `results/<network>-<container id>-<ifname>` as libcni's.
    pub cache_dir: PathBuf,
    /// Limit for each plugin call.
    pub deadline: Duration,
}

/// One attachment: which container, which namespace, which interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeArgs {
    /// Container (sandbox) id.
    pub container_id: String,
    /// Path of the network namespace; for DEL it may be empty or gone.
    pub netns: PathBuf,
    /// Interface name in the container.
    pub ifname: String,
    /// `CNI_ARGS` pairs, `K8S_POD_NAME` and the like.
    pub args: Vec<(String, String)>,
    /// Values for `runtimeConfig` by capability name (`portMappings`, `bandwidth`, …).
    pub capability_args: BTreeMap<String, Value>,
}

/// A failed operation on a network.
#[derive(Debug, thiserror::Error)]
pub enum InvokeError {
    /// An argument does not meet the specification.
    #[error("invalid {field} {value:?}")]
    InvalidArgument {
        /// Which one.
        field: &'static str,
        /// What it was.
        value: String,
    },
    /// A plugin failed, could not run or took too long.
    #[error("plugin {plugin} failed ({command}) for network {network}")]
    Plugin {
        /// Its type.
        plugin: String,
        /// The CNI command.
        command: &'static str,
        /// Name of the network.
        network: String,
        /// What happened.
        #[source]
        source: PluginError,
    },
    /// The result cache could not be read or written.
    #[error("cannot {step} the cached result {}", path.display())]
    Cache {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A cached configuration cannot be parsed.
    #[error("the cached configuration of network {network} is unusable")]
    CachedConfig {
        /// Name of the network.
        network: String,
        /// Why.
        #[source]
        source: ConfigError,
    },
}

impl InvokeError {
    /// Whether an ADD that failed so ran no plugin, so that nothing is to be deleted.
    pub fn ran_nothing(&self) -> bool {
        match self {
            Self::InvalidArgument { .. } => true,
            Self::Plugin { command, source, .. } => {
                *command == "ADD" && matches!(source, PluginError::NotFound { .. })
            }
            Self::Cache { .. } | Self::CachedConfig { .. } => false,
        }
    }
}

impl Invoker {
    /// Attaches: ADD through the chain. On failure everything is deleted again (best effort, bounded
    /// by the same deadlines) before the first error is returned. No plugin is run when one of them is missing: see
    /// [`InvokeError::ran_nothing`].
    pub async fn add(&self, list: &NetworkConfigList, rt: &RuntimeArgs) -> Result<CniResult, InvokeError> {
        check_args(rt)?;
        for plugin in &list.plugins {
            find_plugin(&self.bin_dirs, &plugin.kind)
                .map_err(|missing| plugin_error("ADD", list, plugin, missing))?;
        }
        match self.add_chain(list, rt).await {
            Ok(result) => Ok(result),
            Err(error) => {
                if let Err(rollback) = self.del_chain(list, rt, None).await {
                    tracing::warn!(
                        container = rt.container_id,
                        network = list.name,
                        error = &rollback as &dyn std::error::Error,
                        "rollback after failed ADD is incomplete"
                    );
                }
                Err(error)
            }
        }
    }

    /// Detaches: DEL through the chain backwards, with the cached result where there is one and the
    /// configuration it was attached with, else with `list`. May be repeated; the namespace may be gone.
    pub async fn del(&self, list: &NetworkConfigList, rt: &RuntimeArgs) -> Result<(), InvokeError> {
        check_args(rt)?;
        let cached = cache::read(&self.cache_dir, &list.name, rt)?;
        match cached {
            Some(cached) => {
                let cached_list = cached.list(&list.name)?;
                let rt = cached.runtime_args(rt);
                self.del_chain(&cached_list, &rt, cached.result.as_ref()).await?;
            }
            None => self.del_chain(list, rt, None).await?,
        }
        cache::remove(&self.cache_dir, &list.name, rt)
    }

    /// Checks that an attachment is as ADD left it. Does nothing where the list disables it, its
    /// version has no CHECK, or nothing is cached.
    pub async fn check(&self, list: &NetworkConfigList, rt: &RuntimeArgs) -> Result<(), InvokeError> {
        check_args(rt)?;
        if list.disable_check || !list.cni_version.has_check() {
            return Ok(());
        }
        let Some(cached) = cache::read(&self.cache_dir, &list.name, rt)? else { return Ok(()) };
        for plugin in &list.plugins {
            let input = list.plugin_input(plugin, &rt.capability_args, cached.result.as_ref());
            self.call("CHECK", list, plugin, input, Some(rt)).await?;
        }
        Ok(())
    }

    /// Removes what belongs to attachments other than `valid` (container id, interface name): stale
    /// cached attachments are deleted first, then every plugin gets GC. Goes on after failures and
    /// returns the first.
    pub async fn gc(&self, list: &NetworkConfigList, valid: &[(String, String)]) -> Result<(), InvokeError> {
        let mut first_error = None;
        for stale in cache::list(&self.cache_dir, &list.name)? {
            if valid.contains(&(stale.container_id.clone(), stale.ifname.clone())) {
                continue;
            }
            if let Err(error) = self.del(list, &stale).await {
                first_error.get_or_insert(error);
            }
        }
        if !list.disable_gc && list.cni_version.has_gc_and_status() {
            let attachments: Vec<Value> =
                valid.iter().map(|(id, ifname)| json!({"containerID": id, "ifname": ifname})).collect();
            for plugin in &list.plugins {
                let mut input = list.plugin_input(plugin, &BTreeMap::new(), None);
                input.insert("cni.dev/valid-attachments".to_owned(), attachments.clone().into());
                if let Err(error) = self.call("GC", list, plugin, input, None).await {
                    first_error.get_or_insert(error);
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Whether the network could serve an ADD now: every plugin exists and, from 1.1.0 on, its STATUS
    /// says so.
    pub async fn status(&self, list: &NetworkConfigList) -> Result<(), InvokeError> {
        for plugin in &list.plugins {
            if list.cni_version.has_gc_and_status() {
                let input = list.plugin_input(plugin, &BTreeMap::new(), None);
                self.call("STATUS", list, plugin, input, None).await?;
            } else if let Err(source) = find_plugin(&self.bin_dirs, &plugin.kind) {
                return Err(plugin_error("STATUS", list, plugin, source));
            }
        }
        Ok(())
    }

    /// The versions `plugin` supports, as it tells itself.
    pub async fn version(
        &self,
        list: &NetworkConfigList,
        plugin: &PluginConfig,
    ) -> Result<Value, InvokeError> {
        let input = Map::from_iter([("cniVersion".to_owned(), list.cni_version.as_str().into())]);
        let output = self.call("VERSION", list, plugin, input, None).await?;
        Ok(output.unwrap_or_default())
    }

    /// The cached attachment, if ADD succeeded and DEL has not.
    pub fn cached(
        &self,
        list: &NetworkConfigList,
        rt: &RuntimeArgs,
    ) -> Result<Option<CachedAttachment>, InvokeError> {
        cache::read(&self.cache_dir, &list.name, rt)
    }

    async fn add_chain(&self, list: &NetworkConfigList, rt: &RuntimeArgs) -> Result<CniResult, InvokeError> {
        let mut previous: Option<CniResult> = None;
        for plugin in &list.plugins {
            let input = list.plugin_input(plugin, &rt.capability_args, previous.as_ref());
            let output = self.call("ADD", list, plugin, input, Some(rt)).await?;
            if let Some(output) = output {
                let result = CniResult::from_value(output, list.cni_version)
                    .map_err(|source| plugin_error("ADD", list, plugin, PluginError::Output(source)))?;
                previous = Some(result);
            }
        }
        let result = previous.unwrap_or_default();
        cache::write(&self.cache_dir, list, rt, &result)?;
        Ok(result)
    }

    /// Runs DEL through the whole chain even when a plugin fails, so that the others still clean up.
    async fn del_chain(
        &self,
        list: &NetworkConfigList,
        rt: &RuntimeArgs,
        result: Option<&CniResult>,
    ) -> Result<(), InvokeError> {
        let mut first_error = None;
        for plugin in list.plugins.iter().rev() {
            let input = list.plugin_input(plugin, &rt.capability_args, result);
            if let Err(error) = self.call("DEL", list, plugin, input, Some(rt)).await {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    async fn call(
        &self,
        command: &'static str,
        list: &NetworkConfigList,
        plugin: &PluginConfig,
        input: Map<String, Value>,
        rt: Option<&RuntimeArgs>,
    ) -> Result<Option<Value>, InvokeError> {
        let environment = exec::environment(command, &self.bin_dirs, rt);
        let executable = find_plugin(&self.bin_dirs, &plugin.kind)
            .map_err(|error| plugin_error(command, list, plugin, error))?;
        exec::run(&executable, &environment, &Value::Object(input), self.deadline)
            .await
            .map_err(|error| plugin_error(command, list, plugin, error))
    }
}

fn plugin_error(
    command: &'static str,
    list: &NetworkConfigList,
    plugin: &PluginConfig,
    source: PluginError,
) -> InvokeError {
    InvokeError::Plugin { plugin: plugin.kind.clone(), command, network: list.name.clone(), source }
}

fn check_args(rt: &RuntimeArgs) -> Result<(), InvokeError> {
    if !is_name(&rt.container_id) {
        return Err(InvokeError::InvalidArgument { field: "container id", value: rt.container_id.clone() });
    }
    if !is_interface_name(&rt.ifname) {
        return Err(InvokeError::InvalidArgument { field: "interface name", value: rt.ifname.clone() });
    }
    Ok(())
}

/// Joins directories as `CNI_PATH` wants them.
fn join_path(dirs: &[PathBuf]) -> String {
    dirs.iter().map(|dir: &PathBuf| Path::to_string_lossy(dir)).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests;
