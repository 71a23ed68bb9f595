//! System call filters.

use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use oci_spec::runtime::LinuxSeccomp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::Error;

/// A compiled filter. Clones share the program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Filter {
    #[serde(serialize_with = "write", deserialize_with = "read")]
    pub(crate) program: Arc<[libc::sock_filter]>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub(crate) flags: u32,
}

/// Compiles a profile, or takes what was compiled before from `cache`.
pub(crate) fn compile(profile: &LinuxSeccomp, cache: Option<&Path>) -> Result<Filter, Error> {
    let _ = (profile, cache);
    Err(Error::Unavailable { feature: "linux.seccomp", reason: "not written yet".to_owned() })
}

/// Eight bytes for each instruction, little-endian.
pub(crate) fn to_bytes(program: &[libc::sock_filter]) -> Vec<u8> {
    program
        .iter()
        .flat_map(|insn| {
            let ([c0, c1], [k0, k1, k2, k3]) = (insn.code.to_le_bytes(), insn.k.to_le_bytes());
            [c0, c1, insn.jt, insn.jf, k0, k1, k2, k3]
        })
        .collect()
}

/// The reverse of [`to_bytes`].
pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Vec<libc::sock_filter>> {
    let (parts, []) = bytes.as_chunks::<8>() else { return None };
    let program = parts.iter().map(|[c0, c1, jt, jf, k0, k1, k2, k3]| libc::sock_filter {
        code: u16::from_le_bytes([*c0, *c1]),
        jt: *jt,
        jf: *jf,
        k: u32::from_le_bytes([*k0, *k1, *k2, *k3]),
    });
    Some(program.collect())
}

fn write<S: Serializer>(program: &Arc<[libc::sock_filter]>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(to_bytes(program)))
}

fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<[libc::sock_filter]>, D::Error> {
    use serde::de::Error;
    let text = String::deserialize(deserializer)?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).map_err(D::Error::custom)?;
    let program = from_bytes(&bytes).ok_or_else(|| D::Error::custom("not whole instructions"))?;
    Ok(program.into())
}
