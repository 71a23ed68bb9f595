//! The programs that come inside this executable: the pause program in a root file system of its own, which every sandbox uses
//! read-only, and the keeper.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::error::RuntimeError;

/// The static executable that `build.rs` makes of `bare/pause.rs`.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));

/// Puts the root file system below `root_dir`, replacing one of another version; gives its path.
pub fn install(root_dir: &Path) -> Result<PathBuf, RuntimeError> {
    let root = root_dir.join("pause");
    // runc cannot make mount points in a read-only root, so they are here already.
    for directory in ["dev", "proc", "sys"] {
        let path = root.join(directory);
        std::fs::create_dir_all(&path).map_err(RuntimeError::host("make", &path))?;
    }
    install_program(&root.join("pause"), PROGRAM)?;
    Ok(root)
}

/// Puts the keeper below `root_dir`; gives its path.
pub fn install_keeper(root_dir: &Path) -> Result<PathBuf, RuntimeError> {
    let program = root_dir.join("keeper");
    install_program(&program, super::keeper::PROGRAM)?;
    Ok(program)
}

fn install_program(path: &Path, program: &[u8]) -> Result<(), RuntimeError> {
    if std::fs::read(path).is_ok_and(|installed| installed == program) {
        return Ok(());
    }
    // The file may be running, so it is replaced, not overwritten.
    let new = path.with_extension("new");
    std::fs::write(&new, program).map_err(RuntimeError::host("write", &new))?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o555))
        .map_err(RuntimeError::host("make executable", &new))?;
    std::fs::rename(&new, path).map_err(RuntimeError::host("replace", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_a_small_static_executable_and_installs_twice() {
        assert_eq!(&PROGRAM[..4], b"\x7fELF");
        assert!(PROGRAM.len() < 64 * 1024, "{} bytes", PROGRAM.len());
        let directory = tempfile::tempdir().unwrap();
        let root = install(directory.path()).unwrap();
        install(directory.path()).unwrap();
        assert!(root.join("proc").is_dir());
        assert_eq!(std::fs::metadata(root.join("pause")).unwrap().permissions().mode() & 0o777, 0o555);
    }

    #[test]
    fn it_waits_and_ends_when_asked() {
        let directory = tempfile::tempdir().unwrap();
        let mut child =
            std::process::Command::new(install(directory.path()).unwrap().join("pause")).spawn().unwrap();
        assert!(child.try_wait().unwrap().is_none());
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        // Either way of ending on SIGTERM is fine: it may come before the program blocks it.
        let status = child.wait().unwrap();
        assert!(status.success() || std::os::unix::process::ExitStatusExt::signal(&status) == Some(15));
    }
}
