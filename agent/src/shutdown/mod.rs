//! Graceful shutdown of the node: holds systemd-logind's shutdown back until the pods have ended in order.
//!
//! Inputs: `shutdownGracePeriod…` of the configuration, logind's signal on the system bus, the pods. Outputs: whether the
//! node is going down (no pod is admitted then, and the node is not Ready), and evictions, group after group. Which pods
//! belong together is decided by [`agent_core::shutdown`]. Without logind nothing is held back, and that is said once.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use agent_core::shutdown::{Group, TERMINATED, TERMINATED_MESSAGE, grace, order, total};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::chain::chain;
use crate::pods::directory::{PodDirectory, PodView};
use crate::pods::manager::Eviction;
use crate::system_bus::message::{self, Target, Value};
use crate::system_bus::{self, Bus, BusError};

/// The system bus.
pub const SYSTEM_BUS: &str = system_bus::SOCKET;
/// Where logind reads further settings.
pub const LOGIND_SETTINGS: &str = "/etc/systemd/logind.conf.d";

/// Pauses before the bus is tried again.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// How often the pods' end is looked at.
const END_CHECK: Duration = Duration::from_millis(100);

const MANAGER: Target<'static> = Target {
    destination: "org.freedesktop.login1",
    path: "/org/freedesktop/login1",
    interface: "org.freedesktop.login1.Manager",
    member: "",
};
const RULE: &str = "type='signal',interface='org.freedesktop.login1.Manager',member='PrepareForShutdown',\
                    path='/org/freedesktop/login1'";

/// What the role works with.
pub struct Shutdown {
    /// Who ends together, and how long that may take.
    pub groups: Vec<Group>,
    /// The pods there are.
    pub pods: PodDirectory,
    /// Told which pods have to go.
    pub evictions: mpsc::Sender<Eviction>,
    /// Told whether the node is going down.
    pub going_down: watch::Sender<bool>,
    /// The system bus.
    pub bus: PathBuf,
    /// Where logind reads further settings.
    pub logind_settings: PathBuf,
}

/// Watches until `cancel`.
pub async fn run(shutdown: Shutdown, cancel: CancellationToken) {
    let mut pause = FIRST_PAUSE;
    let mut told = String::new();
    loop {
        // Cancel-safe: what holds the shutdown back goes with the future.
        let ended = tokio::select! {
            () = cancel.cancelled() => return,
            ended = Box::pin(shutdown.session(&mut pause)) => ended,
        };
        if let Err(error) = ended {
            let problem = chain(&error);
            if problem != told {
                warn!(%problem, "a shutdown of the node is not held back for pods");
                told = problem;
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
    }
}

impl Shutdown {
    /// Holds shutdowns back as long as the bus is there.
    async fn session(&self, pause: &mut Duration) -> Result<(), BusError> {
        let mut bus = Bus::connect(&self.bus).await?;
        bus.subscribe(RULE).await?;
        self.raise_delay(&mut bus).await?;
        let mut lock = Some(inhibit(&mut bus).await?);
        *pause = FIRST_PAUSE;
        info!(seconds = total(&self.groups), "a shutdown of the node is held back for pods");
        let mut going_down = property(&mut bus, "PreparingForShutdown").await?.flag().unwrap_or(false);
        loop {
            self.going_down.send_if_modified(|known| std::mem::replace(known, going_down) != going_down);
            if going_down {
                // Cancel-safe: evictions that were sent take their course.
                tokio::select! {
                    () = Box::pin(self.end_pods()) => {
                        info!("the pods have ended; the node may go down");
                        lock = None;
                        going_down = next(&mut bus).await?;
                    }
                    signal = next(&mut bus) => going_down = signal?,
                }
            } else {
                if lock.is_none() {
                    lock = Some(inhibit(&mut bus).await?);
                }
                going_down = next(&mut bus).await?;
            }
        }
    }

    /// Has logind wait as long as the pods may take: its own limit is five seconds.
    async fn raise_delay(&self, bus: &mut Bus) -> Result<(), BusError> {
        let wanted = u64::try_from(total(&self.groups)).unwrap_or(0);
        let allowed = |property: &message::Message| property.number().unwrap_or(0) / 1_000_000;
        if allowed(&property(bus, "InhibitDelayMaxUSec").await?) >= wanted {
            return Ok(());
        }
        std::fs::create_dir_all(&self.logind_settings)?;
        let file = self.logind_settings.join("99-kubelet.conf");
        let text = format!("# Kubelet logind override\n[Login]\nInhibitDelayMaxSec={wanted}\n");
        tokio::fs::write(&file, text).await?;
        let systemd = Target {
            destination: "org.freedesktop.systemd1",
            path: "/org/freedesktop/systemd1",
            interface: "org.freedesktop.systemd1.Manager",
            member: "KillUnit",
        };
        // SIGHUP has logind read its settings again.
        let arguments = [Value::Text("systemd-logind.service"), Value::Text("all"), Value::Int(1)];
        bus.call(systemd, &arguments).await?;
        for _ in 0..50 {
            if allowed(&property(bus, "InhibitDelayMaxUSec").await?) >= wanted {
                info!(file = %file.display(), seconds = wanted, "logind waits for pods");
                return Ok(());
            }
            tokio::time::sleep(END_CHECK).await;
        }
        let allowed = allowed(&property(bus, "InhibitDelayMaxUSec").await?);
        warn!(wanted, allowed, "logind does not wait as long as pods may take: set its InhibitDelayMaxSec");
        Ok(())
    }

    /// Ends all pods, group after group.
    async fn end_pods(&self) {
        let mut pods = self.pods.views();
        pods.retain(|view| !is_over(view));
        let by_priority = pods
            .into_iter()
            .map(|view| (view.pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0), view));
        for (group, members) in order(&self.groups, by_priority.collect()) {
            info!(priority = group.priority, pods = members.len(), seconds = group.seconds, "ending pods");
            let end = async {
                for view in &members {
                    let own = view.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
                    let eviction = Eviction {
                        uid: view.pod.metadata.uid.clone().unwrap_or_default(),
                        reason: TERMINATED,
                        message: TERMINATED_MESSAGE.to_owned(),
                        grace: grace(group, own),
                    };
                    // The manager is gone only when the agent is.
                    drop(self.evictions.send(eviction).await);
                }
                self.wait_for_end(&members).await;
            };
            let seconds = Duration::from_secs(u64::try_from(group.seconds).unwrap_or(0));
            if tokio::time::timeout(seconds, end).await.is_err() {
                warn!(priority = group.priority, "pods have not ended in their time");
            }
        }
    }

    async fn wait_for_end(&self, members: &[PodView]) {
        loop {
            let views = self.pods.views();
            let is_here = |member: &PodView| {
                let uid = &member.pod.metadata.uid;
                views.iter().any(|view| view.pod.metadata.uid == *uid && !is_over(view))
            };
            if !members.iter().any(is_here) {
                return;
            }
            tokio::time::sleep(END_CHECK).await;
        }
    }
}

fn is_over(view: &PodView) -> bool {
    matches!(view.status.phase.as_deref(), Some("Succeeded" | "Failed"))
        && view.observed.alive().next().is_none()
}

async fn property(bus: &mut Bus, name: &str) -> Result<message::Message, BusError> {
    let target = Target { interface: "org.freedesktop.DBus.Properties", member: "Get", ..MANAGER };
    let arguments = [Value::Text(MANAGER.interface), Value::Text(name)];
    bus.call(target, &arguments).await.map(|(message, _)| message)
}

/// The lock; the shutdown waits until it is dropped.
async fn inhibit(bus: &mut Bus) -> Result<OwnedFd, BusError> {
    let arguments = ["shutdown", "kubelet", "Kubelet needs time to handle node shutdown", "delay"];
    let target = Target { member: "Inhibit", ..MANAGER };
    let (_, lock) = bus.call(target, &arguments.map(Value::Text)).await?;
    lock.ok_or(BusError::Protocol("logind gave no lock"))
}

/// The next word on whether the node goes down.
async fn next(bus: &mut Bus) -> Result<bool, BusError> {
    loop {
        let signal = bus.signal().await?;
        if (signal.interface.as_str(), signal.member.as_str()) == (MANAGER.interface, "PrepareForShutdown")
            && let Some(going_down) = signal.flag()
        {
            return Ok(going_down);
        }
    }
}

#[cfg(test)]
mod tests;
