//! An image's passwd and group files, with whatever user the image or the pod names: a user or an error, never another one.
#![no_main]

use cri_shim_api::v1::{Int64Value, LinuxContainerSecurityContext};
use cri_shim_core::users;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str, &str, Option<i64>, Option<i64>, Vec<i64>)| {
    let (user, passwd, group, uid, gid, groups) = input;
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
