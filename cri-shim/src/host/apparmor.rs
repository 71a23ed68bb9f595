//! Loads our default AppArmor profile into the kernel, and looks for the profiles of others.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use cri_shim_core::oci::labels::{DEFAULT_PROFILE, DEFAULT_PROFILE_NAME};

use crate::error::RuntimeError;

/// The profiles the kernel knows, one a line: `<name> (<mode>)`.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
/// The compiler of profiles.
const PARSER: &str = "apparmor_parser";
/// How long it may take on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// Makes sure that the profile is loaded; the error says why it is not. An older text of it is replaced.
pub async fn load_default(directory: &Path) -> Result<(), String> {
    let said = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    std::fs::create_dir_all(directory).map_err(|error| said("the profile's directory", &error))?;
    let path = directory.join(DEFAULT_PROFILE_NAME);
    let known = std::fs::read_to_string(&path).is_ok_and(|text| text == DEFAULT_PROFILE);
    if known && std::fs::read_to_string(LOADED).is_ok_and(|list| is_loaded(&list, DEFAULT_PROFILE_NAME)) {
        return Ok(());
    }
    std::fs::write(&path, DEFAULT_PROFILE).map_err(|error| said("the profile's file", &error))?;
    let mut parser = tokio::process::Command::new(PARSER);
    parser.args(["--replace", "--skip-cache"]).arg(&path).stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(DEADLINE, parser.output()).await;
    let output = ended
        .map_err(|_elapsed| format!("{PARSER} took longer than {} s", DEADLINE.as_secs()))?
        .map_err(|error| said(PARSER, &error))?;
    if output.status.success() {
        return Ok(());
    }
    Err(said(PARSER, &String::from_utf8_lossy(&output.stderr).trim()))
}

/// Refuses a profile that the kernel does not know, by its name: runtimes only say that a file does not exist.
pub fn demand(profile: &str) -> Result<(), RuntimeError> {
    // Stacks and profiles of other namespaces are not in the list; the kernel itself judges them.
    let plain = !profile.starts_with(':') && !profile.contains("//&");
    match std::fs::read_to_string(LOADED) {
        Ok(list) if plain && !is_loaded(&list, profile) => Err(RuntimeError::Invalid {
            field: "apparmor.localhost_ref",
            problem: format!("the AppArmor profile {profile:?} is not loaded on this node"),
        }),
        _ => Ok(()),
    }
}

fn is_loaded(list: &str, name: &str) -> bool {
    list.lines().any(|line| line.rsplit_once(" (").is_some_and(|(known, _)| known == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_list_tells_whether_one_is_loaded() {
        let list = "docker-default (enforce)\nkeelson-default (enforce)\na name (of two) (complain)\n";
        assert!(is_loaded(list, DEFAULT_PROFILE_NAME) && is_loaded(list, "a name (of two)"));
        assert!(!is_loaded("keelson-default-old (enforce)\n", DEFAULT_PROFILE_NAME));
    }
}
