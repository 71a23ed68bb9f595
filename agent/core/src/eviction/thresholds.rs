//! Thresholds as the configuration writes them.

use std::collections::BTreeMap;
use std::time::Duration;

use control_api::quantity::Quantity;

use super::Signal;

/// Upstream's, for Linux.
const DEFAULTS: [(Signal, &str); 5] = [
    (Signal::MemoryAvailable, "100Mi"),
    (Signal::NodeFsAvailable, "10%"),
    (Signal::NodeFsInodesFree, "5%"),
    (Signal::ImageFsAvailable, "15%"),
    (Signal::ImageFsInodesFree, "5%"),
];

/// An amount, or a share of what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// Bytes, inodes, process ids.
    Absolute(u64),
    /// Thousandths of a per cent of the capacity.
    Share(u64),
}

/// One threshold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Threshold {
    /// What is measured.
    pub signal: Signal,
    /// Less than this is too little.
    pub value: Amount,
    /// Of a soft one: how long it must last.
    pub grace: Option<Duration>,
    /// What is to be free beyond the value before it is over.
    pub reclaim: Option<Amount>,
}

/// The fields of the configuration.
#[derive(Debug, Clone, Copy)]
pub struct ThresholdSettings<'a> {
    /// `evictionHard`; absent: the defaults.
    pub hard: Option<&'a BTreeMap<String, String>>,
    /// `evictionSoft`.
    pub soft: &'a BTreeMap<String, String>,
    /// `evictionSoftGracePeriod`.
    pub soft_grace: &'a BTreeMap<String, Duration>,
    /// `evictionMinimumReclaim`.
    pub minimum_reclaim: &'a BTreeMap<String, String>,
    /// `mergeDefaultEvictionSettings`.
    pub merge_defaults: bool,
    /// Pods are held to allocatable together: what holds for the node's memory holds for theirs.
    pub pods_enforced: bool,
}

impl Amount {
    /// The amount for a capacity.
    pub fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Absolute(amount) => amount,
            Self::Share(share) => {
                u64::try_from(u128::from(capacity) * u128::from(share) / 100_000).unwrap_or(u64::MAX)
            }
        }
    }

    /// Reads `100Mi` or `7.5%`.
    fn parse(text: &str) -> Result<Self, &'static str> {
        const FORMAT: &str = "expected an amount as 100Mi or a share as 10%";
        if let Some(percent) = text.strip_suffix('%') {
            let (whole, fraction) = percent.split_once('.').unwrap_or((percent, "0"));
            let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            if !digits(whole) || !digits(fraction) || fraction.len() > 3 {
                return Err(FORMAT);
            }
            let thousandths: u64 = format!("{fraction:0<3}").parse().map_err(|_overflow| FORMAT)?;
            let whole: u64 = whole.parse().map_err(|_overflow| FORMAT)?;
            let share = whole.saturating_mul(1000).saturating_add(thousandths);
            return if share <= 100_000 { Ok(Self::Share(share)) } else { Err("must be at most 100%") };
        }
        let amount = Quantity::parse(text).map_err(|_invalid| FORMAT)?.value();
        u64::try_from(amount).ok().filter(|amount| *amount > 0).map(Self::Absolute).ok_or("must be above 0")
    }

    /// 0 % and 100 % switch a threshold off.
    fn is_off(self) -> bool {
        matches!(self, Self::Share(0 | 100_000))
    }
}

/// Reads all thresholds; one sentence for each that cannot work.
pub fn parse_thresholds(settings: ThresholdSettings<'_>) -> Result<Vec<Threshold>, Vec<String>> {
    let mut problems = Vec::new();
    let mut thresholds = Vec::new();
    let given = settings.hard.cloned().unwrap_or_default();
    let reclaim = amounts("evictionMinimumReclaim", settings.minimum_reclaim, &mut problems);
    let mut hard = amounts("evictionHard", &given, &mut problems);
    if settings.hard.is_none() || settings.merge_defaults {
        for (signal, default) in DEFAULTS {
            if let Ok(amount) = Amount::parse(default) {
                hard.entry(signal).or_insert(amount);
            }
        }
    }
    let mut add = |signal: Signal, value: Amount, grace: Option<Duration>| {
        if !value.is_off() {
            thresholds.push(Threshold { signal, value, grace, reclaim: reclaim.get(&signal).copied() });
        }
    };
    if let Some(value) = hard.get(&Signal::MemoryAvailable).copied().filter(|_| settings.pods_enforced) {
        hard.entry(Signal::AllocatableMemoryAvailable).or_insert(value);
    }
    for (signal, value) in hard {
        // Those of the containers' file system follow from what it is: see `for_container_fs`.
        if !is_container_fs(signal) {
            add(signal, value, None);
        }
    }
    for (signal, value) in amounts("evictionSoft", settings.soft, &mut problems) {
        match settings.soft_grace.get(signal.as_str()) {
            Some(_) if is_container_fs(signal) => {}
            Some(grace) => add(signal, value, Some(*grace)),
            None => problems.push(format!(
                "evictionSoftGracePeriod must be specified for the soft eviction threshold {}",
                signal.as_str()
            )),
        }
    }
    for name in settings.soft_grace.keys().filter(|name| !settings.soft.contains_key(*name)) {
        problems.push(format!("evictionSoftGracePeriod {name} has no threshold in evictionSoft"));
    }
    if problems.is_empty() { Ok(thresholds) } else { Err(problems) }
}

/// Thresholds of the containers' file system: as upstream those of the file system that it is, whatever is configured.
pub fn for_container_fs(thresholds: &[Threshold], on_node_fs: bool) -> Vec<Threshold> {
    let (bytes, inodes) = if on_node_fs {
        (Signal::NodeFsAvailable, Signal::NodeFsInodesFree)
    } else {
        (Signal::ImageFsAvailable, Signal::ImageFsInodesFree)
    };
    let derived = thresholds.iter().filter_map(|threshold| {
        let signal = match threshold.signal {
            signal if signal == bytes => Signal::ContainerFsAvailable,
            signal if signal == inodes => Signal::ContainerFsInodesFree,
            _ => return None,
        };
        Some(Threshold { signal, ..threshold.clone() })
    });
    derived.collect()
}

fn is_container_fs(signal: Signal) -> bool {
    matches!(signal, Signal::ContainerFsAvailable | Signal::ContainerFsInodesFree)
}

fn amounts(
    field: &str,
    given: &BTreeMap<String, String>,
    problems: &mut Vec<String>,
) -> BTreeMap<Signal, Amount> {
    let mut amounts = BTreeMap::new();
    for (name, text) in given {
        let Some(signal) = Signal::ALL.into_iter().find(|signal| signal.as_str() == name) else {
            let known = Signal::ALL.map(Signal::as_str).join(", ");
            problems.push(format!("{field}: unknown eviction signal {name:?}, known are {known}"));
            continue;
        };
        match Amount::parse(text) {
            Ok(amount) => {
                amounts.insert(signal, amount);
            }
            Err(why) => problems.push(format!("{field} {name} {text:?}: {why}")),
        }
    }
    amounts
}
