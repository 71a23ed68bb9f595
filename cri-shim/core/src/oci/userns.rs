//! The user namespace of a pod (`hostUsers: false`): which ids of the node its ids are.

use cri_shim_api::v1::{IdMapping, NamespaceMode, NamespaceOption, UserNamespace};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder};

use super::SpecError;

const FIELD: &str = "namespace_options.userns_options";

/// Both maps of a user namespace, checked: one range of ids each, with a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMaps {
    uids: Vec<IdMapping>,
    gids: Vec<IdMapping>,
}

impl IdMaps {
    /// The maps CRI asks for; nothing when the pod uses the node's users.
    pub fn of(options: Option<&NamespaceOption>) -> Result<Option<Self>, SpecError> {
        let Some(user) = options.and_then(|options| options.userns_options.as_ref()) else { return Ok(None) };
        match user.mode() {
            NamespaceMode::Pod => Self::from_lists(&user.uids, &user.gids).map(Some),
            NamespaceMode::Node if user.uids.is_empty() && user.gids.is_empty() => Ok(None),
            NamespaceMode::Node => refuse("mode NODE has no mappings of its own"),
            mode => refuse(&format!("mode {} is not possible", mode.as_str_name())),
        }
    }

    /// Maps from two lists of CRI.
    fn from_lists(uids: &[IdMapping], gids: &[IdMapping]) -> Result<Self, SpecError> {
        check("uids", uids)?;
        check("gids", gids)?;
        Ok(Self { uids: uids.to_vec(), gids: gids.to_vec() })
    }

    /// The node's user and group that root of the pod is.
    pub fn root(&self) -> (u32, u32) {
        // Checked when it was made.
        (self.host_uid(0).unwrap_or_default(), self.host_gid(0).unwrap_or_default())
    }

    /// The node's user for a user of the pod.
    pub fn host_uid(&self, uid: u32) -> Option<u32> {
        to_host(&self.uids, uid)
    }

    /// The node's group for a group of the pod.
    pub fn host_gid(&self, gid: u32) -> Option<u32> {
        to_host(&self.gids, gid)
    }

    /// Whether a mount's two lists are these maps.
    pub fn is(&self, uids: &[IdMapping], gids: &[IdMapping]) -> bool {
        self.uids == uids && self.gids == gids
    }

    /// The maps as the specification has them: users, groups.
    pub fn to_oci(&self) -> Result<(Vec<LinuxIdMapping>, Vec<LinuxIdMapping>), SpecError> {
        Ok((oci(&self.uids)?, oci(&self.gids)?))
    }

    /// The maps as CRI has them.
    pub fn to_cri(&self) -> UserNamespace {
        UserNamespace { mode: NamespaceMode::Pod.into(), uids: self.uids.clone(), gids: self.gids.clone() }
    }
}

/// The maps of a container, which must be its pod's.
pub fn of_container(
    pod: Option<&NamespaceOption>,
    container: Option<&NamespaceOption>,
) -> Result<Option<IdMaps>, SpecError> {
    let (of_pod, of_container) = (IdMaps::of(pod)?, IdMaps::of(container)?);
    if of_pod != of_container {
        return refuse("the container's user namespace is not its sandbox's");
    }
    Ok(of_pod)
}

/// One range each, as every runtime takes it and the kubelet gives it; so nothing can overlap.
fn check(name: &str, maps: &[IdMapping]) -> Result<(), SpecError> {
    let [map] = maps else {
        return refuse(&format!("{name}: mode POD needs one mapping, not {}", maps.len()));
    };
    let fits = |first: u32| first.checked_add(map.length).is_some();
    if map.length == 0 || !fits(map.host_id) || !fits(map.container_id) {
        let (inside, outside, length) = (map.container_id, map.host_id, map.length);
        return refuse(&format!("{name}: {inside} to {outside}, {length} ids, is no range of ids"));
    }
    if map.container_id != 0 {
        return refuse(&format!("{name}: id 0 is not mapped"));
    }
    Ok(())
}

fn to_host(maps: &[IdMapping], id: u32) -> Option<u32> {
    maps.iter().find_map(|map| {
        id.checked_sub(map.container_id)
            .filter(|offset| *offset < map.length)
            .map(|offset| map.host_id + offset)
    })
}

fn oci(maps: &[IdMapping]) -> Result<Vec<LinuxIdMapping>, SpecError> {
    maps.iter()
        .map(|map| {
            Ok(LinuxIdMappingBuilder::default()
                .host_id(map.host_id)
                .container_id(map.container_id)
                .size(map.length)
                .build()?)
        })
        .collect()
}

fn refuse<T>(problem: &str) -> Result<T, SpecError> {
    Err(SpecError::Invalid { field: FIELD, problem: problem.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(container_id: u32, host_id: u32, length: u32) -> IdMapping {
        IdMapping { host_id, container_id, length }
    }

    fn wanted(mode: NamespaceMode, uids: &[IdMapping], gids: &[IdMapping]) -> NamespaceOption {
        let user = UserNamespace { mode: mode.into(), uids: uids.to_vec(), gids: gids.to_vec() };
        NamespaceOption { userns_options: Some(user), ..NamespaceOption::default() }
    }

    #[test]
    fn ids_of_the_pod_become_ids_of_the_node() {
        let options = wanted(NamespaceMode::Pod, &[map(0, 65_536, 65_536)], &[map(0, 131_072, 65_536)]);
        let maps = IdMaps::of(Some(&options)).unwrap().unwrap();
        assert_eq!(maps.root(), (65_536, 131_072));
        assert_eq!(maps.host_uid(1000), Some(66_536));
        assert_eq!(maps.host_uid(65_536), None, "not in the namespace");
        assert_eq!(maps.to_oci().unwrap().0[0].size(), 65_536);
        assert_eq!(IdMaps::of(None).unwrap(), None);
        assert_eq!(IdMaps::of(Some(&wanted(NamespaceMode::Node, &[], &[]))).unwrap(), None);
    }

    #[test]
    fn impossible_maps_are_refused_by_name() {
        let good = [map(0, 65_536, 65_536)];
        let cases: [(NamespaceOption, &str); 7] = [
            (wanted(NamespaceMode::Pod, &[], &good), "uids: mode POD needs"),
            (wanted(NamespaceMode::Pod, &good, &[]), "gids: mode POD needs"),
            (wanted(NamespaceMode::Pod, &good, &[map(1, 7, 1)]), "gids: id 0 is not mapped"),
            (wanted(NamespaceMode::Pod, &good, &[map(0, u32::MAX, 2)]), "is no range"),
            (wanted(NamespaceMode::Pod, &[map(0, 10, 9), map(9, 30, 9)], &good), "needs one mapping, not 2"),
            (wanted(NamespaceMode::Node, &good, &good), "mode NODE"),
            (wanted(NamespaceMode::Container, &good, &good), "mode CONTAINER is not possible"),
        ];
        for (options, words) in cases {
            let error = IdMaps::of(Some(&options)).unwrap_err().to_string();
            assert!(error.starts_with(FIELD) && error.contains(words), "{words:?} is not in {error}");
        }
    }

    #[test]
    fn a_container_has_its_pods_users() {
        let one = wanted(NamespaceMode::Pod, &[map(0, 65_536, 65_536)], &[map(0, 65_536, 65_536)]);
        assert!(of_container(Some(&one), Some(&one)).unwrap().is_some());
        assert!(of_container(None, None).unwrap().is_none());
        assert!(of_container(Some(&one), None).unwrap_err().to_string().contains("not its sandbox's"));
    }

    proptest! {
        #[test]
        fn accepted_maps_are_one_to_one(
            lists in proptest::collection::vec((any::<u32>(), any::<u32>(), 0_u32..70_000), 0..4),
            id in any::<u32>(),
            other in any::<u32>(),
        ) {
            let maps: Vec<IdMapping> = lists.into_iter().map(|(a, b, length)| map(a, b, length)).collect();
            if let Ok(Some(maps)) = IdMaps::of(Some(&wanted(NamespaceMode::Pod, &maps, &maps)))
                && id != other
                && let (Some(one), Some(two)) = (maps.host_uid(id), maps.host_uid(other))
            {
                prop_assert_ne!(one, two);
            }
        }
    }
}
