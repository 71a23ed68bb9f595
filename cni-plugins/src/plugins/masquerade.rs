//! `keelson-masquerade`: what a pod sends to the outside gets the host's address. Chained behind the plugin that gave the
//! addresses, whose result it hands on; `keelson-bridge` uses the same for its key `ipMasq`.
//!
//! `ipMasqExcept` lists destinations that see the pod's own address (pod networks of other nodes, peered networks). The
//! elements of the kernel's table name their owner. What a pod is to have is recorded before, so that GC can bring it back
//! when somebody else has flushed the rules.

use cni_plugins_host::nft::{
    self, Owner,
    masquerade::{self, Wanted},
};
use cni_plugins_types::{CniResult, ErrorCode, IpNet};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    call::{Attachment, Call, Command},
    failure::Failure,
    state::StateDir,
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

/// Directory of the records.
const PLUGIN: &str = "masquerade";

/// What a pod is to have.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// Its addresses, with their subnets' prefixes.
    addresses: Vec<IpNet>,
    /// Destinations that see them.
    except: Vec<IpNet>,
}

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    match call.command {
        Command::Add => {
            let config: MasqueradeConfig = call.parse()?;
            let result = call.require_prev_result()?;
            attach(call, &addresses(&result), &config.ip_masq_except)?;
            Ok(Some(result))
        }
        Command::Del => detach(call).map(|()| None),
        Command::Check => {
            let config: MasqueradeConfig = call.parse()?;
            let result = call.require_prev_result()?;
            check(call, &addresses(&result), &config.ip_masq_except).map(|()| None)
        }
        Command::Gc => collect(call).map(|()| None),
        Command::Status => {
            call.parse::<MasqueradeConfig>()?;
            status().map(|()| None)
        }
        Command::Version => Ok(None),
    }
}

/// Masquerades the addresses of the call's pod. May be repeated.
pub(crate) fn attach(call: &Call, addresses: &[IpNet], except: &[IpNet]) -> Result<(), Failure> {
    let records = StateDir::of(call, PLUGIN)?;
    records.write(call, &Record { addresses: addresses.to_vec(), except: except.to_vec() })?;
    masquerade::add(&owner(call), addresses, except).map_err(|error| {
        let undone = detach(call).err().map(|failure| failure.to_string());
        Failure::from(error).with_undo_failures(&undone.into_iter().collect::<Vec<_>>())
    })
}

/// Ends it; nothing to end is success. The record goes last, so that a killed call is told by it.
pub(crate) fn detach(call: &Call) -> Result<(), Failure> {
    masquerade::remove(&owner(call))?;
    StateDir::of(call, PLUGIN)?.remove(&call.network, &Attachment::of(call))
}

/// Whether the call's attachment was masqueraded.
pub(crate) fn is_recorded(call: &Call) -> Result<bool, Failure> {
    Ok(StateDir::of(call, PLUGIN)?.has(&call.network, &Attachment::of(call)))
}

/// Whether one of the call's network was.
pub(crate) fn has_records(call: &Call) -> Result<bool, Failure> {
    Ok(!StateDir::of(call, PLUGIN)?.list(&call.network)?.is_empty())
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

/// Ends what no valid attachment of the network explains, and brings back what the others have lost.
pub(crate) fn collect(call: &Call) -> Result<(), Failure> {
    let valid = call.valid_attachments()?;
    let records = StateDir::of(call, PLUGIN)?;
    let recorded = records.list(&call.network)?;
    let pairs: Vec<(String, String)> =
        valid.iter().map(|one| (one.container_id.clone(), one.ifname.clone())).collect();
    masquerade::gc(&call.network, &pairs)?;
    let (kept, stale): (Vec<Attachment>, Vec<Attachment>) =
        recorded.into_iter().partition(|one| valid.contains(one));
    let mut wanted = Vec::new();
    for attachment in &kept {
        let Some(record) = records.read::<Record>(&call.network, attachment)? else { continue };
        wanted.push(Wanted {
            owner: Owner {
                network: &call.network,
                container_id: &attachment.container_id,
                ifname: &attachment.ifname,
            },
            addresses: record.addresses,
            except: record.except,
        });
    }
    masquerade::restore(&wanted)?;
    stale.iter().try_for_each(|attachment| records.remove(&call.network, attachment))
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
