//! An image's passwd and group files, with whatever user the image or the pod names: a user or an error, never another one.
//! The parts of an input stand between lines of `---`: the image's user, passwd, group, and numbers of the pod (uid, gid, groups).
#![no_main]

use cri_shim_api::v1::{Int64Value, LinuxContainerSecurityContext};
use cri_shim_core::users;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let mut parts = text.splitn(4, "---\n");
    let mut next = || parts.next().unwrap_or_default();
    let (user, passwd, group, numbers) = (next().trim_end_matches('\n'), next(), next(), next());
    let mut numbers = numbers.split_whitespace().map(|number| number.parse::<i64>().ok());
    let (uid, gid) = (numbers.next().flatten(), numbers.next().flatten());
    let groups: Vec<i64> = numbers.flatten().collect();
    let security = LinuxContainerSecurityContext {
        run_as_user: uid.map(|value| Int64Value { value }),
        run_as_group: gid.map(|value| Int64Value { value }),
        supplemental_groups: groups,
        ..LinuxContainerSecurityContext::default()
    };
    let Ok(identity) = users::resolve(&security, user, passwd, group) else { return };
    if let Some(uid) = uid {
        assert_eq!(i64::from(identity.uid), uid, "what the pod says counts");
    }
    if let Some(gid) = gid {
        assert_eq!(i64::from(identity.gid), gid, "what the pod says counts");
    }
    let unchanged = |id: &u32| *id == u32::MAX;
    assert!(!unchanged(&identity.uid) && !identity.groups.iter().any(unchanged), "{identity:?}");
    assert!(identity.groups.is_sorted() && identity.groups.contains(&identity.gid));
});
