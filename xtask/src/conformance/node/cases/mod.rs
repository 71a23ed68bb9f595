//! The promises, a file for each few of upstream's areas.

#![allow(clippy::too_many_lines, reason = "tables")]

mod admission;
mod containers;
mod downward;
mod env;
mod ephemeral;
mod hooks;
mod host_path;
mod images;
mod init;
mod kernel;
mod kubelet;
mod logs;
mod mapped;
mod network;
mod node;
mod pods;
mod probes;
mod probes_more;
mod projected;
mod resize;
mod resources;
mod scratch;
mod security;
mod static_pods;
mod streams;
mod stuck;
mod sub_path;

use super::super::case::{Case, case, same};
use super::context::T;
use super::pod::Pod;

/// Every case, in the order of the groups.
pub(super) fn all() -> Vec<Case<T>> {
    [
        pods::cases(),
        containers::cases(),
        init::cases(),
        ephemeral::cases(),
        probes::cases(),
        probes_more::cases(),
        hooks::cases(),
        mapped::cases(),
        downward::cases(),
        projected::cases(),
        scratch::cases(),
        host_path::cases(),
        sub_path::cases(),
        stuck::cases(),
        env::cases(),
        security::cases(),
        network::cases(),
        resources::cases(),
        resize::cases(),
        kernel::cases(),
        images::cases(),
        logs::cases(),
        streams::cases(),
        admission::cases(),
        static_pods::cases(),
        node::cases(),
        kubelet::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A case that is what a pod prints: its script, how the pod differs from an everyday one, and the text without the blanks
/// around it.
fn prints(
    group: &'static str,
    name: &'static str,
    script: &'static str,
    change: fn(Pod) -> Pod,
    expected: &'static str,
) -> Case<T> {
    case(group, name, move |t: T| async move {
        let output = t.output(change(t.pod(script))).await?;
        same("the output", output.trim(), expected)
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::list;

    #[test]
    fn ids_are_unique_and_fit_the_lists_format() {
        let mut ids: Vec<String> = super::all().iter().map(super::Case::id).collect();
        assert!(ids.iter().all(|id| !id.contains(" = ") && !id.starts_with('#')));
        let count = ids.len();
        assert!(count >= 150, "{count} cases");
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), count);
    }

    #[test]
    fn the_list_names_cases_that_exist() {
        let ids: Vec<String> = super::all().iter().map(super::Case::id).collect();
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/conformance/node/keelson.txt");
        list::load(&file, &ids).expect("a list of existing cases");
    }
}
