//! Parts of the specification that are not offered, refused by name rather than left out in silence.

use oci_spec::runtime::{Linux, Spec};

use crate::error::Error;

/// Fails on the first such part.
pub(crate) fn unsupported(spec: &Spec, linux: &Linux) -> Result<(), Error> {
    let hooks = spec.hooks().as_ref().and_then(|hooks| {
        #[allow(deprecated, reason = "an old hook is refused as well")]
        let prestart = hooks.prestart();
        [
            ("hooks.prestart", prestart),
            ("hooks.createRuntime", hooks.create_runtime()),
            ("hooks.createContainer", hooks.create_container()),
            ("hooks.startContainer", hooks.start_container()),
            ("hooks.poststart", hooks.poststart()),
            ("hooks.poststop", hooks.poststop()),
        ]
        .into_iter()
        .find_map(|(name, list)| list.as_ref().is_some_and(|list| !list.is_empty()).then_some(name))
    });
    let parts = [
        (hooks.unwrap_or("hooks"), hooks.is_some()),
        ("windows", spec.windows().is_some()),
        ("solaris", spec.solaris().is_some()),
        ("vm", spec.vm().is_some()),
        ("zos", spec.zos().is_some()),
        ("linux.intelRdt", linux.intel_rdt().is_some()),
        ("linux.memoryPolicy", linux.memory_policy().is_some()),
        ("linux.timeOffsets", linux.time_offsets().as_ref().is_some_and(|offsets| !offsets.is_empty())),
        ("linux.netDevices", linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty())),
        (
            "linux.personality.flags",
            linux
                .personality()
                .as_ref()
                .and_then(|personality| personality.flags().as_ref())
                .is_some_and(|flags| !flags.is_empty()),
        ),
    ];
    match parts.into_iter().find(|(_, present)| *present) {
        Some((field, _)) => Err(Error::spec(field, "is not offered by this runtime")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Hook, HooksBuilder, Linux};

    use super::*;

    #[test]
    fn hooks_are_refused_by_their_name_and_empty_lists_are_not() {
        let mut spec = Spec::default();
        spec.set_hooks(Some(HooksBuilder::default().poststop(Vec::<Hook>::new()).build().unwrap()));
        assert!(unsupported(&spec, &Linux::default()).is_ok());
        spec.set_hooks(Some(HooksBuilder::default().poststop(vec![Hook::default()]).build().unwrap()));
        let error = unsupported(&spec, &Linux::default()).unwrap_err();
        assert_eq!(error.to_string(), "hooks.poststop: is not offered by this runtime");
    }
}
