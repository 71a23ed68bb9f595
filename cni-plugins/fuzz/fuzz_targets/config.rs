//! Network configurations: a list that is accepted gives every plugin an object with the list's name and version.
#![no_main]

use std::collections::BTreeMap;

use cni_plugins_types::NetworkConfigList;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(list) = NetworkConfigList::parse(text) else { return };
    assert!(!list.plugins.is_empty());
    for plugin in &list.plugins {
        let input = list.plugin_input(plugin, &BTreeMap::new(), None);
        assert_eq!(input["name"], list.name.as_str());
        assert_eq!(input["cniVersion"], list.cni_version.as_str());
        assert!(!plugin.kind.contains('/'));
    }
});
