//! Filters of the list calls: every given part must match.

use std::collections::BTreeMap;

use cri_shim_api::v1::{ContainerFilter, ContainerStatsFilter, PodSandboxFilter, PodSandboxStatsFilter};

use crate::record::{ContainerRecord, SandboxRecord};

/// Whether `labels` holds every pair of `selector`.
pub fn labels_match(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn id_matches(wanted: &str, id: &str) -> bool {
    // People type the first digits of an id.
    id.starts_with(wanted)
}

/// Whether a sandbox belongs in the list.
pub fn sandbox(filter: Option<&PodSandboxFilter>, record: &SandboxRecord) -> bool {
    filter.is_none_or(|filter| {
        id_matches(&filter.id, &record.id)
            && filter.state.is_none_or(|state| state.state() == record.state())
            && labels_match(&filter.label_selector, &record.config.labels)
    })
}

/// Whether a sandbox's figures belong in the list.
pub fn sandbox_stats(filter: Option<&PodSandboxStatsFilter>, record: &SandboxRecord) -> bool {
    filter.is_none_or(|filter| {
        id_matches(&filter.id, &record.id) && labels_match(&filter.label_selector, &record.config.labels)
    })
}

/// Whether a container belongs in the list.
pub fn container(filter: Option<&ContainerFilter>, record: &ContainerRecord) -> bool {
    filter.is_none_or(|filter| {
        id_matches(&filter.id, &record.id)
            && id_matches(&filter.pod_sandbox_id, &record.sandbox_id)
            && filter.state.is_none_or(|state| state.state() == record.state())
            && labels_match(&filter.label_selector, &record.config.labels)
    })
}

/// Whether a container's figures belong in the list.
pub fn container_stats(filter: Option<&ContainerStatsFilter>, record: &ContainerRecord) -> bool {
    filter.is_none_or(|filter| {
        id_matches(&filter.id, &record.id)
            && id_matches(&filter.pod_sandbox_id, &record.sandbox_id)
            && labels_match(&filter.label_selector, &record.config.labels)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cri_shim_api::v1::{ContainerState, ContainerStateValue};

    #[test]
    fn every_part_of_a_filter_must_match() {
        let mut record =
            ContainerRecord { id: "abc".into(), sandbox_id: "s1".into(), ..ContainerRecord::default() };
        record.config.labels.insert("app".into(), "web".into());
        let mut filter = ContainerFilter { id: "ab".into(), ..ContainerFilter::default() };
        assert!(container(None, &record) && container(Some(&filter), &record));
        filter.label_selector.insert("app".into(), "db".into());
        assert!(!container(Some(&filter), &record));
        filter.label_selector.insert("app".into(), "web".into());
        filter.state = Some(ContainerStateValue { state: ContainerState::ContainerRunning.into() });
        assert!(!container(Some(&filter), &record), "it was only created");
    }
}
