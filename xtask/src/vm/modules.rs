//! Kernel modules in the order in which they must be loaded, from what each module says it depends on.
//!
//! The package has no `modules.dep`: depmod makes it at installation, and nothing is installed here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The files of the named modules and of all they need, dependencies first. Names that the kernel has built in, or not
/// at all, are left out: the test that needs one says so itself.
pub(super) fn in_order(tree: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let files = index(&tree.join("lib/modules"));
    let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
    for name in names {
        visit(&normal(name), &files, &mut seen, &mut order)?;
    }
    Ok(order)
}

fn visit(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<PathBuf>,
) -> Result<()> {
    let Some(file) = files.get(name) else { return Ok(()) };
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let content = fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    for needed in dependencies(&content) {
        visit(&normal(&needed), files, seen, order)?;
    }
    order.push(file.clone());
    Ok(())
}

/// All modules by their name.
fn index(dir: &Path) -> BTreeMap<String, PathBuf> {
    let (mut found, mut open) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(path);
            } else if let Some(name) = entry.file_name().to_string_lossy().strip_suffix(".ko") {
                found.insert(normal(name), path);
            }
        }
    }
    found
}

/// Modules are called with dashes or underscores alike.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The `depends=` entry of a module's information section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(begin) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let rest = &module[begin + KEY.len()..];
    let end = rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len());
    let list = String::from_utf8_lossy(&rest[..end]);
    list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let net = dir.path().join("lib/modules/6.1/net");
        fs::create_dir_all(&net).unwrap();
        let write = |name: &str, needs: &str| {
            fs::write(net.join(format!("{name}.ko")), format!("x\0depends={needs}\0name={name}\0")).unwrap();
        };
        write("br_netfilter", "bridge");
        write("bridge", "stp,llc");
        write("stp", "llc");
        write("llc", "");
        let found = in_order(dir.path(), &["br-netfilter", "bridge", "built_in"]).unwrap();
        let names: Vec<_> = found.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["llc", "stp", "bridge", "br_netfilter"]);
    }
}
