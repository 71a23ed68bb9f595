//! Shows static pods in the API: one mirror object for each, made anew when somebody deletes it.
//!
//! Input: the static pods and the mirrors that the API has, from the pods' manager. Output: creations and deletions of
//! mirrors; nothing here starts or ends a pod. Level-triggered: after each change, and after a failure again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::chain::chain;

/// The annotation of a mirror: the uid of its static pod.
pub const MIRROR: &str = "kubernetes.io/config.mirror";
/// Deadline of one request.
const DEADLINE: Duration = Duration::from_secs(10);
/// Pauses after failures.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Namespace and name.
pub type PodKey = (String, String);

/// What there is.
#[derive(Debug, Clone, Default)]
pub struct Mirrors {
    /// Static pods that run or are to run; `None` until their sources have told: what they still show stays shown.
    pub statics: Option<BTreeMap<PodKey, Arc<Pod>>>,
    /// Mirrors on this node that the API has; `None` until it has told.
    pub shown: Option<BTreeMap<PodKey, Arc<Pod>>>,
}

/// One request.
#[derive(Debug, Clone, PartialEq)]
enum Request {
    /// The static pod is not shown.
    Create(Arc<Pod>),
    /// The mirror shows nothing that is, or is being deleted.
    Delete { key: PodKey, uid: String },
}

/// The static pod's uid that a mirror shows; `None` for all other pods.
pub fn mirror_of(pod: &Pod) -> Option<&str> {
    pod.metadata.annotations.as_ref()?.get(MIRROR).map(String::as_str)
}

/// Namespace and name of a pod.
pub fn key(pod: &Pod) -> PodKey {
    let metadata = &pod.metadata;
    (metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default())
}

/// Keeps the API's mirrors equal to the static pods until `cancel`.
pub async fn run(
    client: Client,
    mut state: watch::Receiver<Mirrors>,
    mut node: watch::Receiver<Option<Arc<Node>>>,
    cancel: CancellationToken,
) {
    let mut pause = FIRST_PAUSE;
    // Pods whose name another object has: said once.
    let mut clashes: BTreeSet<PodKey> = BTreeSet::new();
    loop {
        let owner = node.borrow_and_update().as_deref().and_then(owner_of);
        let requests = requests(&state.borrow_and_update());
        let mut failed = false;
        for request in requests {
            failed |= match &owner {
                // Without its node the garbage collector could not clear away a mirror.
                None => true,
                Some(owner) => !Box::pin(carry_out(&client, owner, &request, &mut clashes)).await,
            };
        }
        pause = if failed { pause.saturating_mul(2).min(LONGEST_PAUSE) } else { FIRST_PAUSE };
        let again = async {
            if failed {
                tokio::time::sleep(pause).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        // Cancel-safe: watches keep what was not taken, a dropped timer is set again.
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = state.changed() => if changed.is_err() { return },
            Ok(()) = node.changed(), if owner.is_none() => {}
            () = again => {}
        }
    }
}

fn requests(state: &Mirrors) -> Vec<Request> {
    let (Some(shown), Some(statics)) = (&state.shown, &state.statics) else { return Vec::new() };
    let mut requests = Vec::new();
    for (key, mirror) in shown {
        let wanted = statics.get(key).and_then(|pod| pod.metadata.uid.as_deref());
        let is_good = mirror_of(mirror) == wanted && mirror.metadata.deletion_timestamp.is_none();
        if !is_good {
            requests.push(Request::Delete {
                key: key.clone(),
                uid: mirror.metadata.uid.clone().unwrap_or_default(),
            });
        }
    }
    let missing = statics.iter().filter(|(key, _)| !shown.contains_key(*key));
    requests.extend(missing.map(|(_, pod)| Request::Create(Arc::clone(pod))));
    requests
}

fn owner_of(node: &Node) -> Option<OwnerReference> {
    Some(OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.metadata.name.clone()?,
        uid: node.metadata.uid.clone()?,
        controller: Some(true),
        block_owner_deletion: None,
    })
}

/// The object that shows a static pod.
fn mirror(pod: &Pod, owner: &OwnerReference) -> Pod {
    let mut mirror = pod.clone();
    let uid = mirror.metadata.uid.take().unwrap_or_default();
    mirror.metadata.creation_timestamp = None;
    mirror.metadata.owner_references = Some(vec![owner.clone()]);
    mirror.metadata.annotations.get_or_insert_default().insert(MIRROR.to_owned(), uid);
    mirror.status = None;
    mirror
}

/// Whether the request needs no other try.
async fn carry_out(
    client: &Client,
    owner: &OwnerReference,
    request: &Request,
    clashes: &mut BTreeSet<PodKey>,
) -> bool {
    let (namespace, name) = match request {
        Request::Create(pod) => key(pod),
        Request::Delete { key, .. } => key.clone(),
    };
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let sent = async {
        match request {
            Request::Create(pod) => api.create(&PostParams::default(), &mirror(pod, owner)).await.map(|_| ()),
            Request::Delete { uid, .. } => {
                let preconditions = Preconditions { uid: Some(uid.clone()), resource_version: None };
                let params = DeleteParams::default().grace_period(0).preconditions(preconditions);
                api.delete(&name, &params).await.map(|_| ())
            }
        }
    };
    let problem = match tokio::time::timeout(DEADLINE, sent).await {
        Ok(Ok(())) => {
            clashes.remove(&(namespace, name));
            return true;
        }
        Ok(Err(kube::Error::Api(status)))
            if status.code == 404 && matches!(request, Request::Delete { .. }) =>
        {
            return true;
        }
        Ok(Err(kube::Error::Api(status))) if status.code == 409 => {
            // Usually the watch is a moment behind; else an ordinary pod has the name.
            if clashes.insert((namespace.clone(), name.clone())) {
                info!(%namespace, pod = %name, "a static pod cannot be shown yet: {}", status.message);
            }
            return false;
        }
        Ok(Err(error)) => chain(&error),
        Err(_elapsed) => format!("no answer within {} s", DEADLINE.as_secs()),
    };
    warn!(%namespace, pod = %name, %problem, "mirror of a static pod not written");
    false
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, uid: &str, mirrors: Option<&str>) -> Arc<Pod> {
        let annotations = mirrors.map(|of| json!({MIRROR: of})).unwrap_or_default();
        let pod =
            json!({"metadata": {"name": name, "namespace": "ns", "uid": uid, "annotations": annotations}});
        Arc::new(serde_json::from_value(pod).expect("a pod"))
    }

    fn shown(requests: Vec<Request>) -> Vec<String> {
        let text = |request: Request| match request {
            Request::Create(pod) => format!("create {}", pod.metadata.name.as_deref().unwrap_or_default()),
            Request::Delete { key, uid } => format!("delete {} {uid}", key.1),
        };
        requests.into_iter().map(text).collect()
    }

    fn by_key(pods: Vec<Arc<Pod>>) -> BTreeMap<PodKey, Arc<Pod>> {
        pods.into_iter().map(|pod| (key(&pod), pod)).collect()
    }

    #[test]
    fn mirrors_follow_the_static_pods() {
        let statics =
            by_key(vec![pod("new", "s1", None), pod("good", "s2", None), pod("changed", "s3", None)]);
        let mut state = Mirrors { statics: Some(statics.clone()), shown: None };
        assert!(requests(&state).is_empty(), "nothing is known of the API yet");
        let mut deleted = Arc::unwrap_or_clone(pod("deleted", "m5", Some("s5")));
        deleted.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH));
        let mut statics = statics;
        statics.insert(key(&deleted), pod("deleted", "s5", None));
        state.shown = Some(by_key(vec![
            pod("good", "m2", Some("s2")),
            pod("changed", "m3", Some("s-old")),
            pod("gone", "m4", Some("s4")),
            Arc::new(deleted),
        ]));
        state.statics = None;
        assert!(requests(&state).is_empty(), "the manifests are not read yet: what is shown stays");
        state.statics = Some(statics);
        assert_eq!(
            shown(requests(&state)),
            ["delete changed m3", "delete deleted m5", "delete gone m4", "create new"]
        );
    }

    #[test]
    fn a_mirror_names_its_static_pod_and_its_node() {
        let owner = OwnerReference { name: "n".to_owned(), ..OwnerReference::default() };
        let made = mirror(&pod("p", "s1", None), &owner);
        assert_eq!((made.metadata.uid.clone(), mirror_of(&made)), (None, Some("s1")));
        assert_eq!(made.metadata.owner_references, Some(vec![owner]));
    }
}
