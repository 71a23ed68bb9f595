//! ResourceClaims of pods (dynamic resource allocation): which ones a pod needs, whether it may use them, what drivers made
//! ready of them, and which containers get what of it. Pure.
//!
//! A claim is made ready once, however many pods of the node share it, and undone when the last of them is over. What drivers
//! told is kept on disk, so that containers start again without them; whether they were asked is not: a node that was
//! restarted has lost what they made, so the next agent asks again before it makes a sandbox. Upstream's behaviour:
//! `pkg/kubelet/cm/dra`, and so are the words of the errors.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod, PodResourceClaim};
use k8s_openapi::api::resource::v1::ResourceClaim;
use serde::{Deserialize, Serialize};

/// Namespace and name of a ResourceClaim.
pub type ClaimKey = (String, String);

/// Why a pod cannot have its claims now.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// The claim of a template is still to come.
    #[error("pod {pod:?}: ResourceClaim not created yet")]
    NotCreated {
        /// `<namespace>/<name>`.
        pod: String,
    },
    /// Neither a claim nor a template is named.
    #[error("pod {pod:?}, spec.resourceClaim {claim:?}: none of the supported fields are set")]
    Unsupported {
        /// `<namespace>/<name>`.
        pod: String,
        /// The pod's name of the claim.
        claim: String,
    },
    /// Made from a template for somebody else.
    #[error("ResourceClaim {claim} was not created for pod {pod} (pod is not owner)")]
    NotOwner {
        /// `<namespace>/<name>`.
        claim: String,
        /// `<namespace>/<name>`.
        pod: String,
    },
    /// The scheduler did not give it to the pod.
    #[error("pod {pod} ({uid}) is not allowed to use ResourceClaim {claim} ({claim_uid})")]
    NotReserved {
        /// Name.
        pod: String,
        /// The pod's uid.
        uid: String,
        /// Name of the claim.
        claim: String,
        /// The claim's uid.
        claim_uid: String,
    },
    /// Nobody has chosen devices for it.
    #[error("ResourceClaim {claim}: not allocated")]
    NotAllocated {
        /// Name.
        claim: String,
    },
    /// Another claim of the name is still in use here.
    #[error(
        "old ResourceClaim with same name {claim} and different UID {uid} still exists (previous pod force-deleted?!)"
    )]
    Replaced {
        /// Name.
        claim: String,
        /// Of the old one.
        uid: String,
    },
    /// Nothing is known of it here.
    #[error("unable to get information for ResourceClaim {claim}")]
    Unknown {
        /// Name.
        claim: String,
    },
}

/// A claim that a pod names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Name of the ResourceClaim.
    pub name: String,
    /// Made from a template: it must be the pod's own.
    pub must_own: bool,
}

/// A claim that a pod may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usable {
    /// Which.
    pub key: ClaimKey,
    /// Its uid.
    pub uid: String,
    /// Whose devices it has.
    pub drivers: BTreeSet<String>,
}

/// A claim as drivers are told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimRef {
    /// Which.
    pub key: ClaimKey,
    /// Its uid.
    pub uid: String,
}

/// A device that a driver made ready.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Requests of the claim that it is for; none: all of them.
    pub requests: Vec<String>,
    /// Its pool.
    pub pool: String,
    /// Its name there.
    pub device: String,
    /// What the runtime is to be told.
    pub cdi_ids: Vec<String>,
    /// Which share of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share_id: Option<String>,
}

/// What is known of one driver's part in a claim.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What the driver answered; `None`: it has not yet.
    pub devices: Option<Vec<Device>>,
    /// It answered this agent.
    #[serde(skip)]
    pub prepared: bool,
}

/// A claim in use on this node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Its uid.
    pub uid: String,
    /// Uids of the pods that use it.
    pub pods: BTreeSet<String>,
    /// By driver.
    pub drivers: BTreeMap<String, Part>,
}

/// What a container has of one claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held<'a> {
    /// Name of the ResourceClaim.
    pub claim: &'a str,
    /// Its driver and the device.
    pub devices: Vec<(&'a str, &'a Device)>,
}

/// Every claim in use on this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    claims: BTreeMap<ClaimKey, Claim>,
}

/// Whether the pod names any claim.
pub fn has_any(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| spec.resource_claims.iter().flatten().next().is_some())
        || pod.status.as_ref().is_some_and(|status| status.extended_resource_claim_status.is_some())
}

/// The claims that the pod needs, each once. One whose template gave none is not needed.
pub fn named(pod: &Pod) -> Result<Vec<Named>, ClaimError> {
    let mut found: Vec<Named> = Vec::new();
    for wanted in pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten()) {
        if let Some(named) = resolve(pod, wanted)?
            && !found.contains(&named)
        {
            found.push(named);
        }
    }
    let extended = pod.status.as_ref().and_then(|status| status.extended_resource_claim_status.as_ref());
    if let Some(extended) = extended {
        found.push(Named { name: extended.resource_claim_name.clone(), must_own: false });
    }
    Ok(found)
}

fn resolve(pod: &Pod, wanted: &PodResourceClaim) -> Result<Option<Named>, ClaimError> {
    if let Some(name) = &wanted.resource_claim_name {
        return Ok(Some(Named { name: name.clone(), must_own: false }));
    }
    if wanted.resource_claim_template_name.is_none() {
        return Err(ClaimError::Unsupported { pod: full_name(pod), claim: wanted.name.clone() });
    }
    let mut told = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    let made = told
        .find(|status| status.name == wanted.name)
        .ok_or_else(|| ClaimError::NotCreated { pod: full_name(pod) })?;
    Ok(made.resource_claim_name.clone().map(|name| Named { name, must_own: true }))
}

/// Whether the pod may use the claim that it names, and what there is to make ready.
pub fn check(pod: &Pod, named: &Named, claim: &ResourceClaim) -> Result<Usable, ClaimError> {
    let (pod_meta, meta) = (&pod.metadata, &claim.metadata);
    let (uid, claim_uid) = (pod_meta.uid.clone().unwrap_or_default(), meta.uid.clone().unwrap_or_default());
    let namespace = meta.namespace.clone().unwrap_or_default();
    let mut owners = meta.owner_references.iter().flatten();
    let owns = owners.any(|owner| owner.controller == Some(true) && owner.uid == uid);
    if named.must_own && (!owns || meta.namespace != pod_meta.namespace) {
        let claim = format!("{namespace}/{}", named.name);
        return Err(ClaimError::NotOwner { claim, pod: full_name(pod) });
    }
    let status = claim.status.as_ref();
    let mut reserved = status.iter().flat_map(|status| status.reserved_for.iter().flatten());
    if !reserved.any(|consumer| consumer.uid == uid) {
        let pod = pod_meta.name.clone().unwrap_or_default();
        return Err(ClaimError::NotReserved { pod, uid, claim: named.name.clone(), claim_uid });
    }
    let allocation = status
        .and_then(|status| status.allocation.as_ref())
        .ok_or_else(|| ClaimError::NotAllocated { claim: named.name.clone() })?;
    let results = allocation.devices.iter().flat_map(|devices| devices.results.iter().flatten());
    let drivers = results.map(|result| result.driver.clone()).collect();
    Ok(Usable { key: (namespace, named.name.clone()), uid: claim_uid, drivers })
}

fn full_name(pod: &Pod) -> String {
    let part = |part: &Option<String>| part.clone().unwrap_or_default();
    format!("{}/{}", part(&pod.metadata.namespace), part(&pod.metadata.name))
}

impl Ledger {
    /// What an earlier agent knew.
    pub fn restored(claims: impl IntoIterator<Item = (ClaimKey, Claim)>) -> Self {
        Self { claims: claims.into_iter().collect() }
    }

    /// Every claim.
    pub fn claims(&self) -> impl Iterator<Item = (&ClaimKey, &Claim)> {
        self.claims.iter()
    }

    /// The pod uses these from now on, all of them or none; whether that is news.
    pub fn reserve(&mut self, pod_uid: &str, claims: &[Usable]) -> Result<bool, ClaimError> {
        for wanted in claims {
            if let Some(known) = self.claims.get(&wanted.key).filter(|known| known.uid != wanted.uid) {
                let claim = wanted.key.1.clone();
                return Err(ClaimError::Replaced { claim, uid: known.uid.clone() });
            }
        }
        let mut news = false;
        for wanted in claims {
            let entry = self.claims.entry(wanted.key.clone()).or_default();
            entry.uid.clone_from(&wanted.uid);
            news |= entry.pods.insert(pod_uid.to_owned());
            for driver in &wanted.drivers {
                if !entry.drivers.contains_key(driver) {
                    entry.drivers.insert(driver.clone(), Part::default());
                    news = true;
                }
            }
        }
        Ok(news)
    }

    /// What each driver has to be asked for, of these claims.
    pub fn to_prepare(&self, keys: &BTreeSet<ClaimKey>) -> BTreeMap<String, Vec<ClaimRef>> {
        let claims = self.claims.iter().filter(|(key, _)| keys.contains(*key));
        by_driver(claims, |part| !part.prepared)
    }

    /// The driver has made its part of the claim ready.
    pub fn prepared(&mut self, key: &ClaimKey, driver: &str, devices: Vec<Device>) {
        if let Some(part) = self.claims.get_mut(key).and_then(|claim| claim.drivers.get_mut(driver)) {
            *part = Part { devices: Some(devices), prepared: true };
        }
    }

    /// Whether the pod uses any claim.
    pub fn holds(&self, pod_uid: &str) -> bool {
        self.claims.values().any(|claim| claim.pods.contains(pod_uid))
    }

    /// The claims that the pod uses.
    pub fn claims_of(&self, pod_uid: &str) -> BTreeSet<ClaimKey> {
        let used = self.claims.iter().filter(|(_, claim)| claim.pods.contains(pod_uid));
        used.map(|(key, _)| key.clone()).collect()
    }

    /// Pods that use claims, by uid, with their namespace.
    pub fn pods(&self) -> BTreeMap<String, String> {
        let pods = self.claims.iter().flat_map(|(key, claim)| claim.pods.iter().map(move |uid| (uid, key)));
        pods.map(|(uid, (namespace, _))| (uid.clone(), namespace.clone())).collect()
    }

    /// The pod is over: it leaves the claims that other pods use as well. Whether that is news.
    pub fn leave_shared(&mut self, pod_uid: &str) -> bool {
        let mut news = false;
        for claim in self.claims.values_mut().filter(|claim| claim.pods.len() > 1) {
            news |= claim.pods.remove(pod_uid);
        }
        news
    }

    /// What each driver has to undo, of the claims that nobody but this pod uses.
    pub fn to_unprepare(&self, pod_uid: &str) -> BTreeMap<String, Vec<ClaimRef>> {
        by_driver(self.claims.iter().filter(|(_, claim)| is_last(claim, pod_uid)), |_| true)
    }

    /// The driver has undone its part of the claim.
    pub fn unprepared(&mut self, key: &ClaimKey, driver: &str) {
        if let Some(claim) = self.claims.get_mut(key) {
            claim.drivers.remove(driver);
        }
    }

    /// Forgets the pod's claims that no driver has a part in any more. Whether there were any.
    pub fn forget_undone(&mut self, pod_uid: &str) -> bool {
        let before = self.claims.len();
        self.claims.retain(|_, claim| !(claim.drivers.is_empty() && is_last(claim, pod_uid)));
        before != self.claims.len()
    }

    /// Names of CDI devices for the container, each once.
    pub fn cdi_ids(&self, pod: &Pod, container: &Container) -> Result<Vec<String>, ClaimError> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let mut ids: Vec<String> = Vec::new();
        for (name, requests) in requests_of(pod, container)? {
            let unknown = || ClaimError::Unknown { claim: name.clone() };
            let claim = self.claims.get(&(namespace.clone(), name.clone())).ok_or_else(unknown)?;
            for part in claim.drivers.values() {
                let devices = part.devices.as_ref().ok_or_else(unknown)?;
                for device in devices.iter().filter(|device| requests.iter().any(|r| device.is_for(r))) {
                    let news = device.cdi_ids.iter().filter(|id| !ids.contains(id)).cloned();
                    let news: Vec<String> = news.collect();
                    ids.extend(news);
                }
            }
        }
        Ok(ids)
    }

    /// Devices of a claim that the pod calls so, as far as they are known: those of one request, or all for an empty one.
    pub fn of_request(&self, pod: &Pod, claim: &str, request: &str) -> Vec<(&str, &Device)> {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let mut wanted = pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten());
        let named = wanted.find(|wanted| wanted.name == claim).map(|wanted| resolve(pod, wanted));
        let Some(Ok(Some(named))) = named else { return Vec::new() };
        let Some(claim) = self.claims.get(&(namespace, named.name)) else { return Vec::new() };
        let all = claim.drivers.iter().flat_map(|(driver, part)| {
            part.devices.iter().flatten().map(move |device| (driver.as_str(), device))
        });
        all.filter(|(_, device)| device.is_for(request)).collect()
    }

    /// What the container has, claim by claim, as far as it is known.
    pub fn of_container(&self, pod: &Pod, container: &Container) -> Vec<Held<'_>> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let wanted = requests_of(pod, container).unwrap_or_default();
        let mut found = Vec::new();
        for ((of, name), claim) in &self.claims {
            let Some(requests) = wanted.get(name).filter(|_| of == namespace) else { continue };
            let devices = claim.drivers.iter().flat_map(|(driver, part)| {
                part.devices.iter().flatten().map(move |device| (driver.as_str(), device))
            });
            let devices = devices.filter(|(_, device)| requests.iter().any(|request| device.is_for(request)));
            found.push(Held { claim: name, devices: devices.collect() });
        }
        found
    }
}

impl Device {
    /// Whether it belongs to the request; an empty one means the whole claim. Alternatives of a request count as the request.
    fn is_for(&self, request: &str) -> bool {
        let of_one = |own: &String| {
            own == request
                || own.split_once('/').is_some_and(|(parent, _)| parent == request)
                || request.split_once('/').is_some_and(|(parent, _)| parent == own)
        };
        request.is_empty() || self.requests.is_empty() || self.requests.iter().any(of_one)
    }
}

fn is_last(claim: &Claim, pod_uid: &str) -> bool {
    claim.pods.len() == 1 && claim.pods.contains(pod_uid)
}

fn by_driver<'a>(
    claims: impl Iterator<Item = (&'a ClaimKey, &'a Claim)>,
    counts: impl Fn(&Part) -> bool,
) -> BTreeMap<String, Vec<ClaimRef>> {
    let mut found: BTreeMap<String, Vec<ClaimRef>> = BTreeMap::new();
    for (key, claim) in claims {
        for (driver, _) in claim.drivers.iter().filter(|(_, part)| counts(part)) {
            let told = ClaimRef { key: key.clone(), uid: claim.uid.clone() };
            found.entry(driver.clone()).or_default().push(told);
        }
    }
    found
}

/// What the container wants: requests by claim, an empty one for all of the claim.
fn requests_of(pod: &Pod, container: &Container) -> Result<BTreeMap<String, Vec<String>>, ClaimError> {
    let mut wanted: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let resources = container.resources.as_ref();
    let named = |name: &str| {
        let mut claims = pod.spec.iter().flat_map(|spec| spec.resource_claims.iter().flatten());
        claims.find(|claim| claim.name == name)
    };
    for own in resources.iter().flat_map(|resources| resources.claims.iter().flatten()) {
        let Some(claim) = named(&own.name) else { continue };
        if let Some(found) = resolve(pod, claim)? {
            wanted.entry(found.name).or_default().push(own.request.clone().unwrap_or_default());
        }
    }
    let extended = pod.status.as_ref().and_then(|status| status.extended_resource_claim_status.as_ref());
    let asks = |resource: &String| {
        let requests = resources.and_then(|resources| resources.requests.as_ref());
        requests.is_some_and(|requests| requests.contains_key(resource))
    };
    if let Some(extended) = extended {
        for mapping in &extended.request_mappings {
            if mapping.container_name == container.name && asks(&mapping.resource_name) {
                let requests = wanted.entry(extended.resource_claim_name.clone()).or_default();
                requests.push(mapping.request_name.clone());
            }
        }
    }
    Ok(wanted)
}

#[cfg(test)]
mod tests;
