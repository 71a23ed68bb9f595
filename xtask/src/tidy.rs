//! `cargo xtask tidy`: what the compiler does not check: crate edges, purity, module docs, file length, unsafe.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The only edges between the top-level folders (ARCHITECTURE §2): a crate may use a crate of another folder only
/// when the pair is listed here. Binaries of tests, and xtask, are exempt.
const EDGES: &[(&str, &[&str])] = &[
    (
        "agent",
        &[
            "control-api",
            "cri-shim-api",
            "cri-shim-streaming",
            "ebpf-loader",
            "ebpf-common",
            "cni-plugins-host",
        ],
    ),
    ("cri-shim", &["cni-plugins-types", "cni-plugins-host"]),
    ("control", &["cri-shim-streaming"]),
    ("ebpf", &[]),
    ("cni-plugins", &[]),
];

/// Crates that decide and never act.
const PURE: &[&str] = &[
    "control-api",
    "control-decide",
    "agent-core",
    "cri-shim-core",
    "cni-plugins-types",
    "ebpf-common",
    "ebpf-packet",
];

/// What a pure crate must not depend on.
const EFFECTS: &[&str] = &[
    "tokio",
    "hyper",
    "hyper-util",
    "reqwest",
    "axum",
    "kube",
    "nix",
    "libc",
    "rustix",
    "rand",
    "getrandom",
    "rtnetlink",
    "inotify",
    "aya",
    "redb",
    "tempfile",
    "oci-client",
    "containerd-client",
];

/// Longest production file.
const MAX_LINES: usize = 600;

/// Places where `unsafe` may be allowed: they talk to the kernel in ways that no safe crate offers.
const UNSAFE_HOMES: &[&str] = &[
    "ebpf/",
    "agent/src/host",
    "cri-shim/src/host",
    "cri-shim/shim/src/host",
    "cri-shim/runtime/src/host",
    "cni-plugins/host/",
];

/// Runs every check and tells all findings at once.
pub(crate) fn run(repo: &Path) -> Result<()> {
    let mut findings = Vec::new();
    edges(repo, &mut findings)?;
    for file in sources(repo) {
        let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let name = file.strip_prefix(repo).unwrap_or(&file).display().to_string();
        source(&name, &text, &mut findings);
    }
    changelog(repo, &mut findings);
    if findings.is_empty() {
        println!("tidy: ok");
        return Ok(());
    }
    bail!("tidy:\n  {}", findings.join("\n  "));
}

fn edges(repo: &Path, findings: &mut Vec<String>) -> Result<()> {
    let metadata = cargo_metadata::MetadataCommand::new().current_dir(repo).no_deps().exec()?;
    let folder_of = |manifest: &Path| -> String {
        let inside = manifest.strip_prefix(repo).unwrap_or(manifest);
        inside.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned()).unwrap_or_default()
    };
    let folders: BTreeMap<String, String> = metadata
        .packages
        .iter()
        .map(|p| (p.name.to_string(), folder_of(p.manifest_path.as_std_path())))
        .collect();
    for package in &metadata.packages {
        let name = package.name.to_string();
        let folder = &folders[&name];
        let test_kit = folder == "xtask" || name == "ebpf-tests";
        for dependency in
            package.dependencies.iter().filter(|d| d.kind == cargo_metadata::DependencyKind::Normal)
        {
            if PURE.contains(&name.as_str())
                && EFFECTS.contains(&dependency.name.as_str())
                && !dependency.optional
            {
                findings.push(format!("{name} is pure and must not depend on {}", dependency.name));
            }
            let Some(target) = folders.get(&dependency.name) else { continue };
            let allowed: BTreeSet<&str> = EDGES
                .iter()
                .filter(|(from, _)| from == folder)
                .flat_map(|(_, to)| to.iter().copied())
                .collect();
            if target != folder && !test_kit && !allowed.contains(dependency.name.as_str()) {
                findings.push(format!("{name} → {}: not an edge of docs/architecture.md", dependency.name));
            }
        }
    }
    Ok(())
}

/// All Rust files that we wrote: no build output, no generated code.
fn sources(repo: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![repo.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                if !matches!(name.as_str(), "target" | "gen" | ".git" | ".cache") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn source(name: &str, text: &str, findings: &mut Vec<String>) {
    let first = text.lines().find(|line| !line.trim().is_empty() && !line.starts_with("#!["));
    if !first.is_some_and(|line| line.starts_with("//!")) {
        findings.push(format!("{name}: starts without a `//!` that says what the module is for"));
    }
    let test = name.contains("/tests/") || name.ends_with("tests.rs");
    let lines = text.lines().count();
    if lines > MAX_LINES && !test {
        findings.push(format!("{name}: {lines} lines, more than {MAX_LINES}: split it by idea"));
    }
    let allows =
        text.lines().any(|line| line.trim_start().starts_with('#') && line.contains("allow(unsafe_code"));
    if allows && !test && !UNSAFE_HOMES.iter().any(|home| name.starts_with(home)) {
        findings.push(format!("{name}: unsafe code is allowed only in {}", UNSAFE_HOMES.join(", ")));
    }
}

fn changelog(repo: &Path, findings: &mut Vec<String>) {
    let text = fs::read_to_string(repo.join("CHANGELOG.md")).unwrap_or_default();
    if !text.contains("\n## Unreleased\n") {
        findings.push("CHANGELOG.md: has no `## Unreleased` section".to_owned());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_held_to_the_rules() {
        let check = |name: &str, text: &str| {
            let mut findings = Vec::new();
            source(name, text, &mut findings);
            findings
        };
        assert!(check("agent/core/src/lib.rs", "//! Purpose.\nfn f() {}\n").is_empty());
        assert_eq!(check("agent/core/src/lib.rs", "fn f() {}\n").len(), 1);
        assert_eq!(check("control/src/x.rs", "//! P.\n#![allow(unsafe_code, reason = \"r\")]\n").len(), 1);
        assert!(check("ebpf/loader/src/x.rs", "//! P.\n#![allow(unsafe_code, reason = \"r\")]\n").is_empty());
        assert_eq!(check("control/src/x.rs", &format!("//! P.\n{}", "\n".repeat(601))).len(), 1);
    }
}
