//! `keelson-cni install DIR`: a link to this executable for each plugin, replaced atomically.

use std::{
    ffi::OsString,
    io::{self, Write},
    os::unix::fs::symlink,
    path::Path,
    process::ExitCode,
};

use crate::plugins::Plugin;

/// The command line of the executable under its own name.
pub(crate) fn main(args: &[OsString]) -> ExitCode {
    let outcome = match args {
        [command, dir] if command == "install" => install(Path::new(dir)),
        _ => Err(io::Error::other(
            "usage: keelson-cni install DIR; or called by a CNI runtime through a link named \
             keelson-bridge, keelson-ipam or keelson-loopback",
        )),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match writeln!(io::stderr(), "keelson-cni: {error}") {
            Ok(()) | Err(_) => ExitCode::FAILURE,
        },
    }
}

fn install(dir: &Path) -> io::Result<()> {
    let executable = std::env::current_exe()?;
    std::fs::create_dir_all(dir)?;
    for plugin in Plugin::ALL {
        let temporary = dir.join(format!(".{}.{}", plugin.name(), std::process::id()));
        symlink(&executable, &temporary)?;
        std::fs::rename(&temporary, dir.join(plugin.name()))?;
    }
    Ok(())
}
