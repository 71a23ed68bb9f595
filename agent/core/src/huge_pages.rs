//! Huge pages of containers and of the volumes made of them. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::resources::{Side, amount, whole};

/// What the names of such resources begin with; the size of a page follows.
const PREFIX: &str = "hugepages-";
/// The medium of volumes made of them, alone or with `-` and the size of a page.
const MEDIUM: &str = "HugePages";

/// Limits of a container by the size of a page, as the kernel's files name it (`2MB`). Of sizes that the node has and the
/// container did not ask for there is nothing.
pub fn limits<'a>(container: &'a Container, of_node: impl Iterator<Item = &'a str>) -> BTreeMap<String, u64> {
    let own = container.resources.iter().filter_map(|resources| resources.limits.as_ref());
    let names: BTreeSet<&str> = own.flat_map(BTreeMap::keys).map(String::as_str).chain(of_node).collect();
    let sizes = names.into_iter().filter_map(|name| Some((name, page_bytes(name.strip_prefix(PREFIX)?)?)));
    sizes
        .map(|(name, bytes)| {
            let limit = amount(container.resources.as_ref(), Side::Limits, name).unwrap_or(0);
            (kernel_name(bytes), u64::try_from(limit).unwrap_or(0))
        })
        .collect()
}

/// Bytes of a page of a volume of this medium; nothing for other media.
pub fn page_of_medium(medium: &str, spec: &PodSpec) -> Result<Option<u64>, String> {
    let Some(rest) = medium.strip_prefix(MEDIUM) else { return Ok(None) };
    let requested: BTreeSet<u64> = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
        .filter_map(|container| container.resources.as_ref())
        .flat_map(|resources| resources.requests.iter().chain(&resources.limits).flat_map(BTreeMap::keys))
        .filter_map(|name| page_bytes(name.strip_prefix(PREFIX)?))
        .collect();
    if rest.is_empty() {
        let mut sizes = requested.into_iter();
        return match (sizes.next(), sizes.next()) {
            (Some(size), None) => Ok(Some(size)),
            (None, _) => Err("medium HugePages: no container requests huge pages".to_owned()),
            _ => {
                Err("medium HugePages: containers request pages of several sizes; say HugePages-SIZE"
                    .to_owned())
            }
        };
    }
    let size = rest.strip_prefix('-').and_then(page_bytes);
    let size = size.ok_or_else(|| format!("unknown storage medium {medium:?}"))?;
    if requested.contains(&size) {
        Ok(Some(size))
    } else {
        Err(format!("medium {medium}: no container requests pages of this size"))
    }
}

fn page_bytes(size: &str) -> Option<u64> {
    whole(&Quantity(size.to_owned())).and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0)
}

/// As the files of the controller call it.
fn kernel_name(bytes: u64) -> String {
    match bytes {
        _ if bytes.is_multiple_of(1 << 30) => format!("{}GB", bytes >> 30),
        _ if bytes.is_multiple_of(1 << 20) => format!("{}MB", bytes >> 20),
        _ => format!("{}KB", bytes >> 10),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_not_asked_for_is_nothing() {
        let container: Container = serde_json::from_value(
            json!({"name": "a", "resources": {"limits": {"hugepages-2Mi": "4Mi", "memory": "1Gi"}}}),
        )
        .unwrap();
        let found =
            limits(&container, ["cpu", "hugepages-2Mi", "hugepages-1Gi", "hugepages-64Ki"].into_iter());
        let wanted = [("1GB", 0), ("2MB", 4 << 20), ("64KB", 0)];
        assert_eq!(found, wanted.into_iter().map(|(size, limit)| (size.to_owned(), limit)).collect());
    }

    #[test]
    fn the_page_of_a_volume_is_the_one_that_is_requested() {
        let spec = |sizes: &[&str]| -> PodSpec {
            let requests: BTreeMap<_, _> =
                sizes.iter().map(|size| (format!("hugepages-{size}"), "1Gi")).collect();
            serde_json::from_value(json!({"containers": [{"name": "a", "resources": {"limits": requests}}]}))
                .unwrap()
        };
        assert_eq!(page_of_medium("Memory", &spec(&["2Mi"])), Ok(None));
        assert_eq!(page_of_medium("HugePages", &spec(&["2Mi"])), Ok(Some(2 << 20)));
        assert_eq!(page_of_medium("HugePages-1Gi", &spec(&["2Mi", "1Gi"])), Ok(Some(1 << 30)));
        for (medium, sizes) in [
            ("HugePages", &["2Mi", "1Gi"][..]),
            ("HugePages", &[]),
            ("HugePages-1Gi", &["2Mi"]),
            ("HugePagesX", &[]),
        ] {
            assert!(page_of_medium(medium, &spec(sizes)).is_err(), "{medium} {sizes:?}");
        }
    }
}
