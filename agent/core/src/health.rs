//! Health of the devices that containers have, as drivers and plugins tell it, and as a pod's status shows it. Pure.
//!
//! Input: reports of drivers, each a whole list with the time until which it holds. Output: the health of a device now, and what
//! `allocatedResourcesStatus` of a container says. A device that nobody has told of for so long, or whose driver has gone, is
//! `Unknown`. Upstream: KEP-4680, `pkg/kubelet/cm/dra/healthinfo.go`.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, ResourceHealth, ResourceStatus};

use crate::claims;
use crate::devices::{self, Holder};

/// How long a report holds that does not say so itself.
const USUAL_TIMEOUT: SignedDuration = SignedDuration::from_secs(30);
/// A longer one is as good as for ever, and must not overflow.
const LONGEST_TIMEOUT: i64 = 365 * 24 * 3600;
/// Of a message so many characters are shown.
const LONGEST_MESSAGE: usize = 1024;

/// How a device is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Health {
    /// As it should be.
    Healthy,
    /// Not as it should be.
    Unhealthy,
    /// Nobody knows.
    #[default]
    Unknown,
}

impl Health {
    fn word(self) -> &'static str {
        match self {
            Self::Healthy => "Healthy",
            Self::Unhealthy => "Unhealthy",
            Self::Unknown => "Unknown",
        }
    }
}

/// What a driver says of one of its devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Its pool.
    pub pool: String,
    /// Its name there.
    pub device: String,
    /// How it is.
    pub health: Health,
    /// Why, for people.
    pub message: String,
    /// Seconds that this holds; 0 or less: the usual.
    pub timeout: i64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    health: Health,
    message: String,
    until: Timestamp,
}

/// What drivers told of their devices.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HealthBook {
    drivers: BTreeMap<String, BTreeMap<(String, String), Told>>,
}

impl HealthBook {
    /// Takes a driver's report of all its devices; whether any of them is otherwise than it was.
    pub fn take(&mut self, driver: &str, reports: Vec<Report>, now: Timestamp) -> bool {
        let known = self.drivers.entry(driver.to_owned()).or_default();
        // One that is left out is as it was, until that is too long ago.
        known.retain(|_, told| told.until > now);
        let mut changed = false;
        for report in reports {
            let timeout = if report.timeout > 0 {
                SignedDuration::from_secs(report.timeout.min(LONGEST_TIMEOUT))
            } else {
                USUAL_TIMEOUT
            };
            let until = now.checked_add(timeout).unwrap_or(Timestamp::MAX);
            let told = Told { health: report.health, message: shortened(report.message), until };
            let same = |before: &Told| before.health == told.health && before.message == told.message;
            let key = (report.pool, report.device);
            changed |= !known.get(&key).is_some_and(same);
            known.insert(key, told);
        }
        changed
    }

    /// The driver has gone, and with it what it told; whether there was anything.
    pub fn forget(&mut self, driver: &str) -> bool {
        self.drivers.remove(driver).is_some_and(|known| !known.is_empty())
    }

    /// When the next report stops holding.
    pub fn next_timeout(&self, now: Timestamp) -> Option<Timestamp> {
        let all = self.drivers.values().flat_map(BTreeMap::values);
        all.map(|told| told.until).filter(|until| *until > now).min()
    }

    /// Whether a report holds until this very moment.
    pub fn ends_at(&self, at: Timestamp) -> bool {
        self.drivers.values().flat_map(BTreeMap::values).any(|told| told.until == at)
    }

    fn of(&self, driver: &str, device: &claims::Device, now: Timestamp) -> (Health, String) {
        let key = (device.pool.clone(), device.device.clone());
        let told = self.drivers.get(driver).and_then(|known| known.get(&key));
        let told = told.filter(|told| told.until > now);
        told.map(|told| (told.health, told.message.clone())).unwrap_or_default()
    }
}

fn shortened(message: String) -> String {
    if message.chars().count() <= LONGEST_MESSAGE {
        return message;
    }
    message.chars().take(LONGEST_MESSAGE - 3).chain("...".chars()).collect()
}

/// What a container's status says of devices that plugins gave it.
pub fn of_plugins(ledger: &devices::Ledger, holder: &Holder) -> Vec<ResourceStatus> {
    let status = |(resource, grant): (&str, &devices::Grant)| {
        let health = |id: &String| {
            let found = ledger.devices(resource).find(|(known, _)| known == id);
            let health = found.map_or(Health::Unknown, |(_, device)| {
                if device.healthy { Health::Healthy } else { Health::Unhealthy }
            });
            shown(id.clone(), health, String::new())
        };
        let resources = Some(grant.ids.iter().map(health).collect());
        ResourceStatus { name: resource.to_owned(), resources }
    };
    ledger.granted(holder).map(status).collect()
}

/// What a container's status says of devices that it has by ResourceClaims, request by request.
pub fn of_claims(
    ledger: &claims::Ledger,
    book: &HealthBook,
    pod: &Pod,
    container: &Container,
    now: Timestamp,
) -> Vec<ResourceStatus> {
    let wanted = container.resources.iter().flat_map(|resources| resources.claims.iter().flatten());
    let mut all = Vec::new();
    for own in wanted {
        let request = own.request.as_deref().unwrap_or_default();
        let name = match request {
            "" => format!("claim:{}", own.name),
            request => format!("claim:{}/{request}", own.name),
        };
        let devices = ledger.of_request(pod, &own.name, request).into_iter();
        let health = |(driver, device): (&str, &claims::Device)| {
            let (health, message) = book.of(driver, device, now);
            let id = device.cdi_ids.first().cloned();
            let id = id.unwrap_or_else(|| format!("{driver}/{}/{}", device.pool, device.device));
            shown(id, health, message)
        };
        let resources: Vec<ResourceHealth> = devices.map(health).collect();
        if !resources.is_empty() {
            all.push(ResourceStatus { name, resources: Some(resources) });
        }
    }
    all
}

fn shown(id: String, health: Health, message: String) -> ResourceHealth {
    ResourceHealth {
        health: Some(health.word().to_owned()),
        message: Some(message).filter(|message| !message.is_empty()),
        resource_id: id,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1000 + second).expect("in range")
    }

    fn report(device: &str, health: Health, timeout: i64) -> Report {
        Report {
            pool: "pool".to_owned(),
            device: device.to_owned(),
            health,
            message: if health == Health::Unhealthy { "too hot".to_owned() } else { String::new() },
            timeout,
        }
    }

    fn words(statuses: &[ResourceStatus]) -> Vec<String> {
        let health = |one: &ResourceHealth| {
            let message = one.message.as_deref().unwrap_or_default();
            format!("{} {} {message}", one.resource_id, one.health.as_deref().unwrap_or_default())
        };
        let of = |status: &ResourceStatus| {
            let all = status.resources.iter().flatten();
            let all: Vec<String> = all.map(|one| health(one).trim_end().to_owned()).collect();
            format!("{}: {}", status.name, all.join(", "))
        };
        statuses.iter().map(of).collect()
    }

    #[test]
    fn a_report_holds_for_its_time_and_only_news_count() {
        let mut book = HealthBook::default();
        let device = claims::Device { pool: "pool".to_owned(), device: "a".to_owned(), ..Default::default() };
        assert_eq!(book.of("d", &device, at(0)).0, Health::Unknown);
        assert!(book.take("d", vec![report("a", Health::Healthy, 0)], at(0)));
        assert!(!book.take("d", vec![report("a", Health::Healthy, 0)], at(10)), "as it was");
        assert_eq!(book.next_timeout(at(10)), Some(at(40)));
        assert!(book.ends_at(at(40)) && !book.ends_at(at(30)), "it was said again");
        assert_eq!(book.of("d", &device, at(39)).0, Health::Healthy);
        assert_eq!(book.of("d", &device, at(40)).0, Health::Unknown);
        assert!(book.take("d", vec![report("a", Health::Healthy, 0)], at(50)), "it is known again");
        assert!(book.take("d", vec![report("a", Health::Unhealthy, i64::MAX)], at(51)));
        assert!(!book.take("d", Vec::new(), at(100)), "one that is left out is as it was");
        assert_eq!(book.of("d", &device, at(1_000_000)), (Health::Unhealthy, "too hot".to_owned()));
        assert!(book.forget("d") && !book.forget("d"));
        assert_eq!(book.of("d", &device, at(100)).0, Health::Unknown);
        assert_eq!(shortened("x".repeat(2000)), format!("{}...", "x".repeat(1021)));
    }

    #[test]
    fn claims_are_shown_request_by_request() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {"containers": [], "resourceClaims": [{"name": "own", "resourceClaimName": "c"}]},
        }))
        .expect("a pod");
        let container = |claims: serde_json::Value| -> Container {
            serde_json::from_value(json!({"name": "a", "resources": {"claims": claims}}))
                .expect("a container")
        };
        let device = |name: &str, request: &str, cdi: &[&str]| claims::Device {
            requests: vec![request.to_owned()],
            pool: "pool".to_owned(),
            device: name.to_owned(),
            cdi_ids: cdi.iter().map(|&id| id.to_owned()).collect(),
            share_id: None,
        };
        let key = ("ns".to_owned(), "c".to_owned());
        let drivers = BTreeSet::from(["d".to_owned()]);
        let usable = claims::Usable { key: key.clone(), uid: "cu".to_owned(), drivers };
        let mut ledger = claims::Ledger::default();
        ledger.reserve("u", &[usable]).expect("free");
        let mut book = HealthBook::default();
        book.take("d", vec![report("a", Health::Unhealthy, 0), report("b", Health::Healthy, 0)], at(0));
        let shown = |ledger: &claims::Ledger, wanted| {
            words(&of_claims(ledger, &book, &pod, &container(wanted), at(1)))
        };
        let both = json!([{"name": "own", "request": "r"}, {"name": "own", "request": "s"}]);
        assert!(shown(&ledger, both.clone()).is_empty(), "the driver has not made anything ready");
        ledger.prepared(&key, "d", vec![device("a", "r", &["v/c=a", "v/c=x"]), device("b", "s", &[])]);
        assert_eq!(
            shown(&ledger, both),
            ["claim:own/r: v/c=a Unhealthy too hot", "claim:own/s: d/pool/b Healthy"]
        );
        assert_eq!(
            shown(&ledger, json!([{"name": "own"}])),
            ["claim:own: v/c=a Unhealthy too hot, d/pool/b Healthy"]
        );
        assert!(shown(&ledger, json!([])).is_empty());
    }

    #[test]
    fn devices_of_plugins_are_shown_as_these_say() {
        let mut ledger = devices::Ledger::default();
        let device = |healthy| devices::Device { healthy, nodes: Vec::new() };
        let known = BTreeMap::from([("0".to_owned(), device(true)), ("1".to_owned(), device(false))]);
        ledger.set_devices("example.com/gpu", known);
        let holder = ("u".to_owned(), "a".to_owned());
        let ids = ["0", "1", "gone"].map(str::to_owned).into_iter().collect();
        ledger.grant(holder.clone(), "example.com/gpu", devices::Grant { ids, answer: Vec::new() });
        assert_eq!(
            words(&of_plugins(&ledger, &holder)),
            ["example.com/gpu: 0 Healthy, 1 Unhealthy, gone Unknown"]
        );
        assert!(of_plugins(&ledger, &("u".to_owned(), "b".to_owned())).is_empty());
    }
}
