//! System call filters: profiles of the specification compiled by libseccomp, once for each profile.

mod enosys;
mod rules;

use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompFilterFlag};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

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
    let flags = flags(profile);
    let file = cache.map(|cache| cache.join(name(profile)));
    if let Some(program) = file.as_deref().and_then(cached) {
        return Ok(Filter { program: program.into(), flags });
    }
    let program = rules::compile(profile)?;
    if let Some(file) = &file {
        keep(file, &program).map_err(Error::step(format!("keep the filter {}", file.display())))?;
    }
    Ok(Filter { program: program.into(), flags })
}

fn flags(profile: &LinuxSeccomp) -> u32 {
    profile.flags().iter().flatten().fold(0, |bits, flag| {
        bits | match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => 1,
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => 2,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => 4,
            LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 32,
        }
    })
}

/// The name of a profile's compiled form: changes with the profile and with what this crate makes of it.
fn name(profile: &LinuxSeccomp) -> String {
    let mut hash = Sha256::new();
    hash.update(b"keelson seccomp 1\n");
    hash.update(std::env::consts::ARCH);
    // A list of plain values: its JSON is always the same.
    hash.update(serde_json::to_vec(profile).unwrap_or_default());
    let hash = hash.finalize();
    let number = hash.iter().take(16).fold(0_u128, |number, byte| number << 8 | u128::from(*byte));
    format!("{number:032x}.bpf")
}

fn cached(file: &Path) -> Option<Vec<libc::sock_filter>> {
    let program = from_bytes(&std::fs::read(file).ok()?)?;
    // Empty or cut short: made anew.
    let ends = program.last().is_some_and(|last| last.code & 7 == 6);
    ends.then_some(program)
}

fn keep(file: &Path, program: &[libc::sock_filter]) -> std::io::Result<()> {
    let directory = file.parent().unwrap_or(Path::new("/"));
    std::fs::create_dir_all(directory)?;
    // Several processes may do this at once: each has a file of its own until it is whole.
    let new = file.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()));
    std::fs::write(&new, to_bytes(program))?;
    std::fs::rename(&new, file)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_survives_its_json() {
        let insn = |code, k| libc::sock_filter { code, jt: 1, jf: 2, k };
        let filter = Filter { program: vec![insn(0x20, 4), insn(6, 0x7fff_0000)].into(), flags: 4 };
        let back: Filter = serde_json::from_str(&serde_json::to_string(&filter).unwrap()).unwrap();
        assert_eq!(to_bytes(&back.program), to_bytes(&filter.program));
        assert_eq!(back.flags, 4);
        assert!(from_bytes(&[0; 9]).is_none());
    }

    #[test]
    fn a_kept_program_is_taken_only_when_whole() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sub/x.bpf");
        let program = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0x7fff_0000 }];
        keep(&file, &program).unwrap();
        assert_eq!(cached(&file).unwrap().len(), 1);
        std::fs::write(&file, b"").unwrap();
        assert!(cached(&file).is_none());
        assert_eq!(std::fs::read_dir(dir.path().join("sub")).unwrap().count(), 1);
    }
}
