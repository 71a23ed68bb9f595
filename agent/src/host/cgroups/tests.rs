//! Bookkeeping that needs no kernel; `tests/root_host.rs` has the rest.

use super::*;

#[test]
fn the_burstable_class_weighs_what_its_pods_weigh() {
    let cgroups = Cgroups::new(CgroupTree::new("/keelson/up/", CgroupDriver::Cgroupfs));
    let pod = |uid: &str| format!("/keelson/up/kubepods/burstable/pod{uid}");
    assert_eq!(cgroups.burstable_sum(&pod("a"), Some(100)), Some(100));
    assert_eq!(cgroups.burstable_sum(&pod("b"), Some(512)), Some(612));
    assert_eq!(cgroups.burstable_sum(&pod("b"), Some(256)), Some(356));
    assert_eq!(cgroups.burstable_sum(&pod("a"), None), Some(256));
    assert_eq!(cgroups.burstable_sum(&pod("b"), None), Some(BEST_EFFORT_SHARES));
    assert_eq!(cgroups.burstable_sum("/keelson/up/kubepods/podguaranteed", Some(9)), None);
}
