//! Parts of the specification that are not offered, refused by name rather than left out in silence.

use oci_spec::runtime::{Linux, Spec};

use crate::error::Error;

/// Fails on the first such part.
pub(crate) fn unsupported(spec: &Spec, linux: &Linux) -> Result<(), Error> {
    let parts = [
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
    use oci_spec::runtime::Linux;

    use super::*;

    #[test]
    fn what_is_not_offered_is_refused_by_its_name() {
        let linux = |text: serde_json::Value| serde_json::from_value::<Linux>(text).unwrap();
        assert!(unsupported(&Spec::default(), &Linux::default()).is_ok());
        assert!(unsupported(&Spec::default(), &linux(serde_json::json!({ "timeOffsets": {} }))).is_ok());
        let rdt = linux(serde_json::json!({ "intelRdt": { "closID": "guaranteed" } }));
        let error = unsupported(&Spec::default(), &rdt).unwrap_err();
        assert_eq!(error.to_string(), "linux.intelRdt: is not offered by this runtime");
    }
}
