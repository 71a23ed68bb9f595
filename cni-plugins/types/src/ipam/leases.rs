//! What is held, as a log: every change is one line, and the lines give the state.
//!
//! Input: the text of the log, the boot id, a request. Output: [`Change`]s, whose lines the caller appends
//! before it acts on them, and the addresses. A line is complete or (its newline missing, because the
//! writer was killed) does not count, so an attachment's addresses are given all at once or not at all.
//!
//! ```text
//! keelson-ipam 1 <boot id>
//! + <container> <interface> <netns or -> <pod or -> <address>[,<address>…]
//! - <container> <interface>
//! ~ <address> <pod that had it last>
//! . <address>[,<address>…]          given last, oldest first
//! ```
//!
//! Containers do not outlive a boot: a log of another boot id holds nothing any more, and only what was
//! given last and who had it (`~`, `.`) is taken over. That is also why no line has to be synced to the
//! disk: a crash that loses lines has a new boot id behind it.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write,
    net::IpAddr,
};

use super::{AllocateError, Allocation, RangeSet, StaticAddress};

/// First word of the log.
const MAGIC: &str = "keelson-ipam 1";
/// How the first lines of all formats begin.
const FAMILY: &str = "keelson-ipam ";
/// How much of a line that is not understood is told: it may be of any length.
const TOLD: usize = 80;
/// Stands for an absent field.
const NONE: &str = "-";
/// How many of the addresses given last are known: one per set is enough.
const RECENT: usize = 64;
/// How many addresses' last pods are known.
const REMEMBERED: usize = 16_384;

/// Who holds addresses: a container's interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// Container id.
    pub container_id: String,
    /// Interface name.
    pub ifname: String,
}

/// Addresses in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Who holds them.
    pub owner: Owner,
    /// Path of the network namespace; empty when unknown.
    pub netns: String,
    /// Namespace and name of the pod, when its addresses are to be remembered; else empty.
    pub pod: String,
    /// The addresses, in the order of the sets.
    pub addrs: Vec<IpAddr>,
}

/// One line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Addresses are held from now on.
    Take(Lease),
    /// An owner's addresses are free from now on.
    Release(Owner),
}

/// What an attachment asks for.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Who asks.
    pub owner: &'a Owner,
    /// Path of its network namespace.
    pub netns: &'a str,
    /// Namespace and name of its pod, to give it the addresses it had; empty for any.
    pub pod: &'a str,
    /// One address of each.
    pub sets: &'a [RangeSet],
    /// And exactly these.
    pub fixed: &'a [StaticAddress],
    /// Addresses of the sets that it wants.
    pub wanted: &'a [IpAddr],
}

/// The state.
#[derive(Debug, Clone, Default)]
pub struct Leases {
    held: BTreeMap<Owner, Lease>,
    holders: BTreeMap<IpAddr, Owner>,
    remembered: BTreeMap<IpAddr, String>,
    recent: VecDeque<IpAddr>,
    lines: usize,
}

/// A log that was read.
#[derive(Debug)]
pub struct Loaded {
    /// The state it gives.
    pub leases: Leases,
    /// Bytes up to the end of its last complete line.
    pub complete: usize,
    /// Whether it is of another boot, and the state is what is taken over.
    pub stale: bool,
}

/// A line that nobody writes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} is not understood: {text:?}")]
pub struct BadLine {
    /// Its number, from 1.
    pub line: usize,
    /// Its text.
    pub text: String,
}

impl BadLine {
    fn new(line: usize, text: &str) -> Self {
        Self { line, text: text.chars().take(TOLD).collect() }
    }
}

impl Leases {
    /// Whether this is a log, of whatever format.
    pub fn is_log(bytes: &[u8]) -> bool {
        bytes.starts_with(FAMILY.as_bytes())
    }

    /// Reads a log. One that does not begin as ours does is refused, also when it is empty: nobody here writes that, so it
    /// is of another version or damaged, and pods may run whose addresses it told of.
    pub fn load(text: &str, boot_id: &str) -> Result<Loaded, BadLine> {
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines = text[..complete].lines();
        let first = lines.next();
        let boot_of_log = first.and_then(|line| line.strip_prefix(header("").as_str()));
        let Some(boot_of_log) = boot_of_log.filter(|boot| !boot.is_empty()) else {
            return Err(BadLine::new(1, first.unwrap_or(text)));
        };
        let stale = boot_of_log != boot_id;
        let mut leases = Leases::default();
        for (index, line) in lines.enumerate() {
            leases.lines += 1;
            if leases.read_line(line).is_none() && !stale {
                return Err(BadLine::new(index + 2, line));
            }
        }
        if stale {
            leases = leases.after_boot();
        }
        Ok(Loaded { leases, complete, stale })
    }

    /// Chooses addresses. The second value is what has to be recorded first; nothing when the owner
    /// holds just these already.
    pub fn take(&self, request: &Request<'_>) -> Result<(Vec<Allocation>, Vec<Change>), AllocateError> {
        let held_by_other =
            |addr: IpAddr| self.holders.get(&addr).is_some_and(|holder| holder != request.owner);
        let before = self.held.get(request.owner);
        let mut wanted = request.wanted.to_vec();
        let mut given = Vec::with_capacity(request.fixed.len() + request.sets.len());
        for fixed in request.fixed {
            if held_by_other(fixed.address.addr()) {
                return Err(AllocateError::NotAvailable(fixed.address.addr()));
            }
            given.push(Allocation { address: fixed.address, gateway: fixed.gateway });
        }
        for set in request.sets {
            let position = wanted.iter().position(|addr| set.find(*addr).is_some());
            let allocation = match position.map(|position| wanted.swap_remove(position)) {
                Some(addr) if held_by_other(addr) => return Err(AllocateError::NotAvailable(addr)),
                Some(addr) => set.find(addr).ok_or(AllocateError::Outside(addr))?,
                None => self.choose(request, set, before)?,
            };
            given.push(allocation);
        }
        if let Some(addr) = wanted.first() {
            return Err(AllocateError::Outside(*addr));
        }
        let lease = Lease {
            owner: request.owner.clone(),
            netns: request.netns.to_owned(),
            pod: request.pod.to_owned(),
            addrs: given.iter().map(|allocation| allocation.address.addr()).collect(),
        };
        if before == Some(&lease) {
            return Ok((given, Vec::new()));
        }
        let release = before.map(|_| Change::Release(request.owner.clone()));
        Ok((given, release.into_iter().chain([Change::Take(lease)]).collect()))
    }

    /// An address of `set`: the one held, else the one had before, else the next free one.
    fn choose(
        &self,
        request: &Request<'_>,
        set: &RangeSet,
        before: Option<&Lease>,
    ) -> Result<Allocation, AllocateError> {
        if let Some(kept) = before.and_then(|lease| lease.addrs.iter().find_map(|addr| set.find(*addr))) {
            return Ok(kept);
        }
        let is_fixed = |addr: IpAddr| request.fixed.iter().any(|fixed| fixed.address.addr() == addr);
        let is_held = |addr: IpAddr| self.holders.contains_key(&addr) || is_fixed(addr);
        let had = || {
            let mine = self.remembered.iter().filter(|(_, pod)| *pod == request.pod);
            mine.filter(|(addr, _)| !is_held(**addr)).find_map(|(addr, _)| set.find(*addr))
        };
        if let Some(again) = (!request.pod.is_empty()).then(had).flatten() {
            return Ok(again);
        }
        let last = self.recent.iter().rev().find(|addr| set.holds(**addr)).copied();
        set.allocate(last, is_held)
    }

    /// What has to be recorded to free an owner's addresses; nothing when it holds none.
    pub fn release(&self, owner: &Owner) -> Option<Change> {
        self.held.contains_key(owner).then(|| Change::Release(owner.clone()))
    }

    /// What has to be recorded to free the addresses of all owners that are not kept.
    pub fn release_all_but(&self, is_kept: impl Fn(&Lease) -> bool) -> Vec<Change> {
        let stale = self.held.values().filter(|lease| !is_kept(lease));
        stale.map(|lease| Change::Release(lease.owner.clone())).collect()
    }

    /// Takes a recorded change into the state.
    pub fn apply(&mut self, change: &Change) {
        self.lines += 1;
        match change {
            Change::Take(lease) => {
                self.forget(&lease.owner.clone());
                for addr in &lease.addrs {
                    self.holders.insert(*addr, lease.owner.clone());
                    self.note_recent(*addr);
                    if lease.pod.is_empty() {
                        self.remembered.remove(addr);
                    } else {
                        self.remember(*addr, lease.pod.clone());
                    }
                }
                self.held.insert(lease.owner.clone(), lease.clone());
            }
            Change::Release(owner) => self.forget(owner),
        }
    }

    /// The addresses `owner` holds.
    pub fn held_by(&self, owner: &Owner) -> &[IpAddr] {
        self.held.get(owner).map(|lease| lease.addrs.as_slice()).unwrap_or_default()
    }

    /// Whether somebody holds `addr`.
    pub fn is_held(&self, addr: IpAddr) -> bool {
        self.holders.contains_key(&addr)
    }

    /// Every lease, by owner.
    pub fn iter(&self) -> impl Iterator<Item = &Lease> {
        self.held.values()
    }

    /// An address of `set` that is free, to say whether there is one.
    pub fn free_in(&self, set: &RangeSet) -> Result<Allocation, AllocateError> {
        set.allocate(None, |addr| self.is_held(addr))
    }

    /// Whether the log has become long for what it says and should be replaced by [`Leases::snapshot`].
    pub fn is_long(&self) -> bool {
        self.lines > 256 + 2 * (self.held.len() + self.remembered.len())
    }

    /// A log that gives this state and nothing else.
    pub fn snapshot(&mut self, boot_id: &str) -> String {
        let mut text = header(boot_id);
        text.push('\n');
        let mut lines = 0;
        let mut line = |words: std::fmt::Arguments<'_>| {
            lines += 1;
            text.write_fmt(words).expect("writing to a string cannot fail");
            text.push('\n');
        };
        for (addr, pod) in &self.remembered {
            line(format_args!("~ {addr} {pod}"));
        }
        for lease in self.held.values() {
            line(format_args!("{}", Change::Take(lease.clone()).line()));
        }
        if !self.recent.is_empty() {
            line(format_args!(". {}", join(self.recent.iter())));
        }
        self.lines = lines;
        text
    }

    fn read_line(&mut self, line: &str) -> Option<()> {
        let mut words = line.split(' ');
        let mut next = || words.next().filter(|word| !breaks(word));
        match next()? {
            "+" => {
                let owner = Owner { container_id: next()?.to_owned(), ifname: next()?.to_owned() };
                let present = |word: &str| if word == NONE { String::new() } else { word.to_owned() };
                let (netns, pod) = (present(next()?), present(next()?));
                let addrs = addresses(next()?)?;
                self.apply(&Change::Take(Lease { owner, netns, pod, addrs }));
            }
            "-" => {
                let owner = Owner { container_id: next()?.to_owned(), ifname: next()?.to_owned() };
                self.apply(&Change::Release(owner));
            }
            "~" => {
                let addr = next()?.parse().ok()?;
                self.remember(addr, next()?.to_owned());
            }
            "." => addresses(next()?)?.into_iter().for_each(|addr| self.note_recent(addr)),
            _ => return None,
        }
        // `apply` counts for its callers; a line that was read is counted once.
        if matches!(line.as_bytes().first(), Some(b'+' | b'-')) {
            self.lines -= 1;
        }
        next().is_none().then_some(())
    }

    fn after_boot(self) -> Self {
        Self { remembered: self.remembered, recent: self.recent, ..Self::default() }
    }

    fn forget(&mut self, owner: &Owner) {
        let Some(lease) = self.held.remove(owner) else { return };
        for addr in lease.addrs {
            if self.holders.get(&addr) == Some(owner) {
                self.holders.remove(&addr);
            }
        }
    }

    fn remember(&mut self, addr: IpAddr, pod: String) {
        self.remembered.insert(addr, pod);
        while self.remembered.len() > REMEMBERED {
            self.remembered.pop_first();
        }
    }

    fn note_recent(&mut self, addr: IpAddr) {
        self.recent.push_back(addr);
        while self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }
}

impl Change {
    /// The line of the log, without its newline.
    pub fn line(&self) -> String {
        match self {
            Change::Take(Lease { owner, netns, pod, addrs }) => format!(
                "+ {} {} {} {} {}",
                owner.container_id,
                owner.ifname,
                word(netns),
                word(pod),
                join(addrs.iter())
            ),
            Change::Release(owner) => format!("- {} {}", owner.container_id, owner.ifname),
        }
    }
}

fn header(boot_id: &str) -> String {
    format!("{MAGIC} {boot_id}")
}

/// A field that may be absent; one that would break the line counts as absent.
fn word(text: &str) -> &str {
    if breaks(text) { NONE } else { text }
}

/// Whether a field would not be read back as it was written.
fn breaks(text: &str) -> bool {
    text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control())
}

fn join<'a>(addrs: impl Iterator<Item = &'a IpAddr>) -> String {
    addrs.map(IpAddr::to_string).collect::<Vec<_>>().join(",")
}

fn addresses(text: &str) -> Option<Vec<IpAddr>> {
    text.split(',').map(|addr| addr.parse().ok()).collect()
}

#[cfg(test)]
mod tests;
