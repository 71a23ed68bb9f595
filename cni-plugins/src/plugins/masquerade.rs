//! `keelson-masquerade`: what a pod sends to the outside gets the host's address. Chained behind the plugin that gave the
//! addresses, whose result it hands on; `keelson-bridge` uses the same for its key `ipMasq`.
//!
//! `ipMasqExcept` lists destinations that see the pod's own address (pod networks of other nodes, peered networks). The
//! kernel's table is the only state; its elements name their owner.

use cni_plugins_host::nft::{self, Owner, masquerade};
use cni_plugins_types::{CniResult, ErrorCode, IpNet};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    call::{Call, Command},
    failure::Failure,
};

/// The object on standard input.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct MasqueradeConfig {
    /// Destinations that see the pod's own address.
    #[serde(default)]
    ip_masq_except: Vec<IpNet>,
    /// Nothing in it is for this plugin; that it is an object is checked all the same.
    #[serde(default, rename = "runtimeConfig")]
    _runtime_config: Map<String, Value>,
}

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    let config: MasqueradeConfig = call.parse()?;
    match call.command {
        Command::Add => {
            let result = call.require_prev_result()?;
            attach(call, &addresses(&result), &config.ip_masq_except)?;
            Ok(Some(result))
        }
        Command::Del => detach(call).map(|()| None),
        Command::Check => {
            let result = call.require_prev_result()?;
            check(call, &addresses(&result), &config.ip_masq_except).map(|()| None)
        }
        Command::Gc => collect(call).map(|()| None),
        Command::Status => status().map(|()| None),
        Command::Version => Ok(None),
    }
}

/// Masquerades the addresses of the call's pod. May be repeated.
pub(crate) fn attach(call: &Call, addresses: &[IpNet], except: &[IpNet]) -> Result<(), Failure> {
    Ok(masquerade::add(&owner(call), addresses, except)?)
}

/// Ends it; nothing to end is success.
pub(crate) fn detach(call: &Call) -> Result<(), Failure> {
    masquerade::remove(&owner(call))?;
    Ok(())
}

/// Whether it is as [`attach`] left it.
pub(crate) fn check(call: &Call, addresses: &[IpNet], except: &[IpNet]) -> Result<(), Failure> {
    if masquerade::check(&owner(call), addresses, except)? {
        return Ok(());
    }
    Err(Failure::different(format!(
        "addresses of container {} are missing in the nftables table inet {}",
        call.container_id,
        nft::TABLE
    )))
}

/// Ends what no valid attachment of the network explains.
pub(crate) fn collect(call: &Call) -> Result<(), Failure> {
    let valid: Vec<(String, String)> =
        call.valid_attachments()?.into_iter().map(|one| (one.container_id, one.ifname)).collect();
    masquerade::gc(&call.network, &valid)?;
    Ok(())
}

/// Whether the kernel could do it.
pub(crate) fn status() -> Result<(), Failure> {
    nft::available().map_err(|error| Failure::new(ErrorCode::NotAvailable, Failure::from(error).message()))
}

/// The addresses of the pod in a result.
fn addresses(result: &CniResult) -> Vec<IpNet> {
    let in_pod = |index: u32| {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        result.interfaces.get(index).is_some_and(|interface| !interface.sandbox.is_empty())
    };
    result.ips.iter().filter(|ip| ip.interface.is_none_or(in_pod)).map(|ip| ip.address).collect()
}

fn owner(call: &Call) -> Owner<'_> {
    Owner { network: &call.network, container_id: &call.container_id, ifname: &call.ifname }
}
