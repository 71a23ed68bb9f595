//! `keelson-portmap`: ports of the host that lead to a pod. Chained behind the plugin that made the interface, whose result
//! it hands on.
//!
//! Every pod's ports are recorded before anything is programmed ([`record`]); from the records follows what the kernel
//! must have, who holds a port, and what DEL and GC take away. A live agent that carries host ports itself is offered
//! them first ([`agent`]); without one they go into nftables. ADD of a port that another pod holds is refused.

mod agent;
mod config;
mod record;

use std::collections::BTreeSet;

use cni_plugins_host::{
    nft::{self, NftError, conntrack, ports::Mappings},
    sysctl,
};
use cni_plugins_types::{CniResult, ErrorCode};
use nix::errno::Errno;

use self::{
    config::PortmapConfig,
    record::{Carrier, Claim, Record, Records},
};
use crate::{
    call::{Attachment, Call, Command},
    failure::Failure,
};

/// Directory of the records.
const PLUGIN: &str = "portmap";
/// A port is held by another pod.
const PORT_HELD: ErrorCode = ErrorCode::Other(104);

/// Carries out one call.
pub(crate) fn run(call: &Call) -> Result<Option<CniResult>, Failure> {
    match call.command {
        Command::Add => add(call).map(Some),
        Command::Del => del(call).map(|()| None),
        Command::Check => check(call).map(|()| None),
        Command::Gc => gc(call).map(|()| None),
        Command::Status => {
            PortmapConfig::of(call)?;
            nft::available()
                .map_err(|error| Failure::new(ErrorCode::NotAvailable, Failure::from(error).message()))?;
            Ok(None)
        }
        Command::Version => Ok(None),
    }
}

fn add(call: &Call) -> Result<CniResult, Failure> {
    let result = call.require_prev_result()?;
    let config = PortmapConfig::of(call)?;
    let claims = config.claims(&result)?;
    let attachment = Attachment::of(call);
    if claims.is_empty() {
        // An earlier ADD of the same pod may have had ports.
        del(call)?;
        return Ok(result);
    }
    let records = Records::open(call)?;
    let before = records.all()?;
    refuse_held(call, &claims, &before)?;
    let own_before = before.iter().find(|record| record.is_of(&call.network, &attachment));
    let rest = mappings(before.iter().filter(|record| !record.is_of(&call.network, &attachment)));
    let links = if config.snat { links(&claims)? } else { BTreeSet::new() };
    let mut record = Record::new(call, claims, links);
    records.write(call, &record)?;
    let programmed = program(&records, call, &mut record, own_before, &rest);
    if let Err(failure) = programmed {
        let undone = take_away(&records, &call.network, &attachment, &record, &rest);
        let failures: Vec<String> = undone.err().map(|undo| undo.to_string()).into_iter().collect();
        return Err(failure.with_undo_failures(&failures));
    }
    Ok(result)
}

/// Programs what is recorded, by the agent or by nftables.
fn program(
    records: &Records,
    call: &Call,
    record: &mut Record,
    before: Option<&Record>,
    rest: &Mappings,
) -> Result<(), Failure> {
    if let Some(old) = before {
        nft::ports::remove(&records.scope(), &old.mappings(), rest)?;
    }
    let offered = agent::offer(records.dir(), &Records::file_name(&call.network, &Attachment::of(call)));
    if let Some(taken) = offered {
        record.carrier = Carrier::Agent;
        records.write(call, record)?;
        drop(taken);
    } else {
        nft::ports::add(&records.scope(), &record.mappings())
            .map_err(|error| mapped_by_others(call, error))?;
        for link in &record.links {
            if record.claims.iter().any(|claim| claim.target.is_ipv4()) {
                // Without it the kernel takes no answer to 127.0.0.1; what else it would let through is dropped by the
                // table's guard chain.
                sysctl::set(&format!("net/ipv4/conf/{link}/route_localnet"), "1")?;
            }
        }
    }
    conntrack::forget_udp(&record.udp_ports())?;
    Ok(())
}

fn del(call: &Call) -> Result<(), Failure> {
    let Some(records) = Records::open_existing(call)? else { return Ok(()) };
    let attachment = Attachment::of(call);
    let all = records.all()?;
    let Some(own) = all.iter().find(|record| record.is_of(&call.network, &attachment)) else { return Ok(()) };
    let rest = mappings(all.iter().filter(|record| !record.is_of(&call.network, &attachment)));
    take_away(&records, &call.network, &attachment, own, &rest)
}

/// Ends a pod's ports; the record goes last, so that a killed call is told by it.
fn take_away(
    records: &Records,
    network: &str,
    attachment: &Attachment,
    own: &Record,
    rest: &Mappings,
) -> Result<(), Failure> {
    if own.carrier == Carrier::Agent {
        agent::withdraw(records.dir(), &Records::file_name(network, attachment));
    }
    nft::ports::remove(&records.scope(), &own.mappings(), rest)?;
    conntrack::forget_udp(&own.udp_ports())?;
    records.remove(network, attachment)
}

fn check(call: &Call) -> Result<(), Failure> {
    let result = call.require_prev_result()?;
    let config = PortmapConfig::of(call)?;
    let claims = config.claims(&result)?;
    if claims.is_empty() {
        return Ok(());
    }
    let attachment = Attachment::of(call);
    let records = Records::open_existing(call)?;
    let all = records.as_ref().map(Records::all).transpose()?.unwrap_or_default();
    let own = all.iter().find(|record| record.is_of(&call.network, &attachment));
    let own = own.filter(|record| record.claims == claims).ok_or_else(|| {
        Failure::different(format!("the host ports of container {} are not recorded", call.container_id))
    })?;
    let missing_in_agent =
        |records: &Records| agent::misses(records.dir(), &Records::file_name(&call.network, &attachment));
    if own.carrier == Carrier::Agent && records.as_ref().is_some_and(missing_in_agent) {
        return Err(Failure::different(format!(
            "host ports of container {} are missing in the agent's data plane",
            call.container_id
        )));
    }
    if own.carrier == Carrier::Nftables && !nft::ports::present(&own.mappings())? {
        return Err(Failure::different(format!(
            "host ports of container {} are missing in the nftables table inet {}",
            call.container_id,
            nft::TABLE
        )));
    }
    Ok(())
}

/// Removes the records that no valid attachment explains, then brings the kernel to what the others say.
fn gc(call: &Call) -> Result<(), Failure> {
    let valid = call.valid_attachments()?;
    let Some(records) = Records::open_existing(call)? else { return Ok(()) };
    let all = records.all()?;
    let (stale, kept): (Vec<&Record>, Vec<&Record>) = all.iter().partition(|record| {
        record.network == call.network && !valid.iter().any(|one| record.is_of(&call.network, one))
    });
    for record in stale.iter().filter(|record| record.carrier == Carrier::Agent) {
        agent::withdraw(records.dir(), &Records::file_name(&record.network, &record.attachment()));
    }
    nft::ports::replace(&records.scope(), &mappings(kept.into_iter()))?;
    let udp: BTreeSet<u16> = stale.iter().flat_map(|record| record.udp_ports()).collect();
    conntrack::forget_udp(&udp)?;
    stale.iter().try_for_each(|record| records.remove(&record.network, &record.attachment()))
}

/// Removes the table; the records are the caller's.
pub(crate) fn cleanup() -> Result<Vec<String>, Failure> {
    let removed = nft::flush_all()?;
    Ok(if removed { vec![format!("nftables table inet {}", nft::TABLE)] } else { Vec::new() })
}

/// What nftables must have for these records: nothing for those that the agent carries.
fn mappings<'a>(records: impl Iterator<Item = &'a Record>) -> Mappings {
    let mut all = Mappings::default();
    records
        .filter(|record| record.carrier == Carrier::Nftables)
        .for_each(|record| all.extend(&record.mappings()));
    all
}

/// The links that lead to the pods of these claims.
fn links(claims: &BTreeSet<Claim>) -> Result<BTreeSet<String>, Failure> {
    let addresses: BTreeSet<_> = claims.iter().map(|claim| claim.target.ip()).collect();
    let mut links = BTreeSet::new();
    for address in addresses {
        links.extend(nft::route::link_to(address)?);
    }
    Ok(links)
}

/// What the kernel refuses because it has another element for a port: the records of another `stateDir` explain that.
fn mapped_by_others(call: &Call, error: NftError) -> Failure {
    if error.is(Errno::EEXIST) || error.is(Errno::EBUSY) {
        return Failure::new(
            PORT_HELD,
            format!(
                "a hostPort of container {} is held by a pod of another stateDir; `nft list table inet {}` shows which",
                call.container_id,
                nft::TABLE
            ),
        );
    }
    error.into()
}

/// Refuses a port that another pod holds, on the same address or on all of them.
fn refuse_held(call: &Call, claims: &BTreeSet<Claim>, records: &[Record]) -> Result<(), Failure> {
    let attachment = Attachment::of(call);
    for record in records.iter().filter(|record| !record.is_of(&call.network, &attachment)) {
        let clash = claims.iter().find(|claim| record.claims.iter().any(|held| claim.clashes_with(held)));
        if let Some(claim) = clash {
            let pod = record.pod.as_ref().map(|pod| format!(" (pod {pod})")).unwrap_or_default();
            return Err(Failure::new(
                PORT_HELD,
                format!(
                    "hostPort {claim} is held by container {}{pod} of network {}",
                    record.container_id, record.network
                ),
            ));
        }
    }
    Ok(())
}
