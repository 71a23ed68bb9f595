//! systemd's part in pods' cgroups: the slices it makes, and the limits that it must know of.
//!
//! The limits are written to the files, too, by those who call this: systemd knows fewer and coarser ones. What it was not
//! told of it would put back to its default when it reloads or a unit below changes.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use agent_core::qos::{PodCgroup, weight_from_shares};
use tokio::sync::Mutex;

use crate::chain::chain;
use crate::system_bus::message::{Property, Target, Value};
use crate::system_bus::{Bus, BusError, SOCKET};

const MANAGER: Target<'static> = Target {
    destination: "org.freedesktop.systemd1",
    path: "/org/freedesktop/systemd1",
    interface: "org.freedesktop.systemd1.Manager",
    member: "",
};
/// Errors of systemd's that say how things are: there is such a unit already, or none.
const EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NONE: &str = "org.freedesktop.systemd1.NoSuchUnit";
/// No limit, in systemd's words.
const INFINITY: u64 = u64::MAX;

/// Microseconds in which a quota of CPU time counts, unless somebody wants another.
const USUAL_PERIOD: u64 = 100_000;
/// How long a call may take with its wait for others'.
const PATIENCE: Duration = Duration::from_secs(20);

/// A property and its value.
pub(super) type Limit = (&'static str, Property<'static>);

/// What a unit has from its start: its controllers, and no dependency on units that stop before the machine does.
const FROM_THE_START: [Limit; 7] = [
    ("Description", Property::Text("Keelson: pods")),
    ("DefaultDependencies", Property::Truth(false)),
    ("CPUAccounting", Property::Truth(true)),
    ("MemoryAccounting", Property::Truth(true)),
    ("TasksAccounting", Property::Truth(true)),
    ("IOAccounting", Property::Truth(true)),
    ("BlockIOAccounting", Property::Truth(true)),
];

/// The weight of a slice.
pub(super) fn weight(shares: u64, unified: bool) -> Limit {
    if unified {
        ("CPUWeight", Property::Number(weight_from_shares(shares)))
    } else {
        ("CPUShares", Property::Number(shares))
    }
}

/// The memory that a slice may use.
pub(super) fn memory(bytes: Option<u64>, unified: bool) -> Limit {
    (if unified { "MemoryMax" } else { "MemoryLimit" }, Property::Number(bytes.unwrap_or(INFINITY)))
}

/// All limits of a pod; absent ones are lifted.
pub(super) fn of_pod(cgroup: &PodCgroup, unified: bool) -> Vec<Limit> {
    let mut limits = vec![
        weight(cgroup.cpu_shares, unified),
        memory(cgroup.memory_max, unified),
        ("TasksMax", Property::Number(cgroup.pids_max.unwrap_or(INFINITY))),
    ];
    // systemd counts in whole percents.
    let second = cgroup.cpu_quota.map_or(INFINITY, |(quota, period)| {
        (quota.saturating_mul(1_000_000) / period.max(1)).next_multiple_of(10_000)
    });
    // Known to systemd from 242 on, and its own choice when it is the usual one.
    let period = cgroup.cpu_quota.map(|(_, period)| period).filter(|period| *period != USUAL_PERIOD);
    limits.extend(period.map(|period| ("CPUQuotaPeriodUSec", Property::Number(period))));
    limits.push(("CPUQuotaPerSecUSec", Property::Number(second)));
    limits
}

/// systemd, as far as slices go.
pub(super) struct Slices {
    socket: PathBuf,
    /// Kept from call to call.
    bus: Mutex<Option<Bus>>,
}

impl std::fmt::Debug for Slices {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Slices").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Default for Slices {
    fn default() -> Self {
        Self { socket: SOCKET.into(), bus: Mutex::new(None) }
    }
}

impl Slices {
    /// Starts the slice at `path`, or changes the limits of the one that runs; its files are written by systemd when this
    /// returns `false`, and a little later when it was started now.
    pub(super) async fn ensure(&self, path: &str, limits: &[Limit]) -> io::Result<bool> {
        let name = unit(path);
        let all: Vec<Limit> = FROM_THE_START.iter().chain(limits).copied().collect();
        let arguments = [Value::Text(name), Value::Text("replace"), Value::Properties(&all), Value::NoUnits];
        if self.call("StartTransientUnit", &arguments, EXISTS).await? {
            return Ok(true);
        }
        // Only for as long as the unit lives.
        let arguments = [Value::Text(name), Value::Truth(true), Value::Properties(limits)];
        self.call("SetUnitProperties", &arguments, "").await?;
        // The answer comes before the files are written; the next call is looked at after that.
        self.call("GetUnit", &[Value::Text(name)], NONE).await.map(|_known| false)
    }

    /// Ends the slice with what runs below it; one that is not there is fine.
    pub(super) async fn end(&self, path: &str) -> io::Result<()> {
        let arguments = [Value::Text(unit(path)), Value::Text("replace")];
        self.call("StopUnit", &arguments, NONE).await.map(drop)
    }

    /// Calls systemd; `false` when it answers with the error that the caller expects. A connection that has ended meanwhile
    /// is made anew once.
    async fn call(&self, member: &'static str, arguments: &[Value<'_>], expected: &str) -> io::Result<bool> {
        let called = tokio::time::timeout(PATIENCE, self.call_alone(member, arguments, expected)).await;
        called.unwrap_or_else(|_elapsed| {
            let late = format!("cgroupDriver systemd: {member} took longer than {} s", PATIENCE.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, late))
        })
    }

    /// Cancel-safe: a connection is kept only after its answer.
    async fn call_alone(
        &self,
        member: &'static str,
        arguments: &[Value<'_>],
        expected: &str,
    ) -> io::Result<bool> {
        let mut kept = self.bus.lock().await;
        let mut is_old = kept.is_some();
        loop {
            let mut bus = match kept.take() {
                Some(bus) => bus,
                None => Bus::connect(&self.socket).await.map_err(|error| told(&error))?,
            };
            match bus.call(Target { member, ..MANAGER }, arguments).await {
                Ok(_) => {
                    *kept = Some(bus);
                    return Ok(true);
                }
                Err(BusError::Refused { error, .. }) if error == expected => {
                    *kept = Some(bus);
                    return Ok(false);
                }
                Err(BusError::Io(_)) if is_old => is_old = false,
                Err(error) => return Err(told(&error)),
            }
        }
    }
}

fn told(error: &BusError) -> io::Error {
    io::Error::other(format!("cgroupDriver systemd: {}", chain(error)))
}

/// The slice's name: the last part of its path.
fn unit(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_s_limits_are_properties_of_its_slice() {
        let mut pod = PodCgroup {
            path: "/kubepods.slice/kubepods-podx.slice".to_owned(),
            cpu_shares: 512,
            cpu_quota: Some((12_750, 50_000)),
            memory_max: Some(1 << 20),
            pids_max: None,
        };
        let number = |name, number| (name, Property::Number(number));
        assert_eq!(
            of_pod(&pod, true),
            [
                number("CPUWeight", 20),
                number("MemoryMax", 1 << 20),
                number("TasksMax", INFINITY),
                number("CPUQuotaPeriodUSec", 50_000),
                number("CPUQuotaPerSecUSec", 260_000),
            ]
        );
        pod.cpu_quota = Some((25_500, 100_000));
        assert_eq!(of_pod(&pod, true)[3..], [number("CPUQuotaPerSecUSec", 260_000)]);
        (pod.cpu_quota, pod.memory_max) = (None, None);
        assert_eq!(
            of_pod(&pod, false),
            [
                number("CPUShares", 512),
                number("MemoryLimit", INFINITY),
                number("TasksMax", INFINITY),
                number("CPUQuotaPerSecUSec", INFINITY),
            ]
        );
    }

    #[test]
    fn a_slice_is_called_by_the_end_of_its_path() {
        assert_eq!(unit("/kubepods.slice/kubepods-podx.slice"), "kubepods-podx.slice");
    }
}
