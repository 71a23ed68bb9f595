//! The promises, a file per group.

pub(super) mod container;
pub(super) mod exec;
pub(super) mod idempotence;
pub(super) mod images;
pub(super) mod labels;
pub(super) mod logs;
pub(super) mod mounts;
pub(super) mod network;
pub(super) mod others;
pub(super) mod resources;
pub(super) mod runtime;
pub(super) mod sandbox;
pub(super) mod seccomp;
pub(super) mod security;
pub(super) mod streaming;
pub(super) mod systemd;

use super::case::Case;

/// Every case, in the order of the groups.
pub(super) fn all() -> Vec<Case> {
    [
        runtime::cases(),
        sandbox::cases(),
        container::cases(),
        exec::cases(),
        logs::cases(),
        idempotence::cases(),
        network::cases(),
        security::cases(),
        seccomp::cases(),
        labels::cases(),
        mounts::cases(),
        resources::cases(),
        systemd::cases(),
        streaming::cases(),
        images::cases(),
        others::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn ids_are_unique_and_fit_the_lists_format() {
        let mut ids: Vec<String> = super::all().iter().map(super::Case::id).collect();
        assert!(ids.iter().all(|id| !id.contains(" = ") && !id.starts_with('#')));
        let count = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), count);
    }

    #[test]
    fn the_lists_name_cases_that_exist() {
        let ids: Vec<String> = super::all().iter().map(super::Case::id).collect();
        for name in ["containerd-1.6.txt", "keelson.txt", "keelson-crun.txt"] {
            let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/conformance").join(name);
            super::super::list::load(&file, &ids).expect("a list of existing cases");
        }
    }
}
