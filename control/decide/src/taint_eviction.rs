//! When a pod must leave its node because of `NoExecute` taints.
//!
//! <https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/#taint-based-evictions>

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, Taint};

use crate::object;

/// When the pod must go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// It may stay.
    Never,
    /// At this time, unless the taints are gone by then; at once when it has passed.
    At(Timestamp),
}

/// Decides for one pod on a node with these taints; `since` is when the taints were first seen with it.
pub fn eviction(pod: &Pod, taints: &[Taint], since: Timestamp) -> Eviction {
    let tolerations = object::pod_tolerations(pod);
    let mut deadline: Option<i64> = None;
    let mut tainted = false;
    for taint in taints.iter().filter(|taint| taint.effect == "NoExecute") {
        tainted = true;
        match tolerations.iter().find(|toleration| object::tolerates(toleration, taint)) {
            None => return Eviction::At(since),
            Some(toleration) => {
                if let Some(seconds) = toleration.toleration_seconds {
                    deadline = Some(deadline.map_or(seconds, |least| least.min(seconds)));
                }
            }
        }
    }
    match deadline {
        Some(seconds) if tainted => {
            Eviction::At(since + SignedDuration::from_secs(seconds.clamp(0, LONGEST)))
        }
        _ => Eviction::Never,
    }
}

/// Longer tolerations mean the same as this one and keep the arithmetic in range (a hundred years).
const LONGEST: i64 = 100 * 365 * 24 * 3600;

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{PodSpec, Toleration};

    use super::*;

    fn pod(tolerations: &[(&str, Option<i64>)]) -> Pod {
        let tolerations = tolerations.iter().map(|(key, seconds)| Toleration {
            key: Some((*key).to_owned()),
            operator: Some("Exists".into()),
            effect: Some("NoExecute".into()),
            toleration_seconds: *seconds,
            value: None,
        });
        Pod {
            spec: Some(PodSpec { tolerations: Some(tolerations.collect()), ..PodSpec::default() }),
            ..Pod::default()
        }
    }

    #[test]
    fn the_shortest_toleration_decides() {
        let taint =
            |key: &str, effect: &str| Taint { key: key.into(), effect: effect.into(), ..Taint::default() };
        let both = [taint("a", "NoExecute"), taint("b", "NoExecute")];
        let start = Timestamp::UNIX_EPOCH;
        let after = |seconds| Eviction::At(start + SignedDuration::from_secs(seconds));
        for (description, pod, taints, expected) in [
            ("no taint", pod(&[]), &[][..], Eviction::Never),
            ("only NoSchedule", pod(&[]), &[taint("a", "NoSchedule")][..], Eviction::Never),
            ("not tolerated", pod(&[("a", None)]), &both[..], after(0)),
            ("tolerated for ever", pod(&[("a", None), ("b", None)]), &both[..], Eviction::Never),
            ("for a while", pod(&[("a", Some(300)), ("b", Some(60))]), &both[..], after(60)),
        ] {
            assert_eq!(eviction(&pod, taints, start), expected, "{description}");
        }
    }
}
