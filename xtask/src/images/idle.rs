//! The images that CRI servers are measured and tested with: busybox, a pause image for containerd's plugin, and a
//! workload that does nothing and ends at once when it is asked to.
//!
//! The pause program is keelson-cri's own, so that both sides of a comparison pause with the same bytes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use super::layer::{Entry, Tree};
use super::{Catalog, Image, Store, deb, rootfs};
use crate::cmd::{Cmd, step};
use crate::process::write_atomic;

/// Raised whenever the content changes.
const RECIPE: u32 = 1;
/// Source of the pause program, below the checkout.
const PAUSE: &str = "cri-shim/src/host/bare/pause.rs";

/// Makes the images in `dir` unless they are there already.
pub(crate) fn ensure(repo: &Path, dir: &Path) -> Result<Store> {
    let store = Store::at(dir);
    if store.catalog().is_ok_and(|catalog| catalog.recipe == RECIPE) {
        return Ok(store);
    }
    fs::create_dir_all(dir.join("blobs")).with_context(|| format!("creating {}", dir.display()))?;
    step("making the images for CRI servers from Debian's busybox and the pause program", || {
        build(repo, &store)
    })?;
    Ok(store)
}

/// Makes the pause image alone, which takes nothing from Debian.
pub(crate) fn pause(repo: &Path, dir: &Path) -> Result<Store> {
    fs::create_dir_all(dir.join("blobs")).with_context(|| format!("creating {}", dir.display()))?;
    let store = Store::at(dir);
    let mut own = Tree::default();
    own.add("pause", Entry::File(0o755, fs::read(compile(repo, dir)?)?));
    let own = store.put_layer(&own)?;
    let mut catalog = Catalog { recipe: RECIPE, ..Catalog::default() };
    let (layers, runtime) = (&[&own][..], json!({"Entrypoint": ["/pause"]}));
    let architecture = deb::architecture()?;
    let image = Image { name: "pause", tags: &["3.9"], architecture: &architecture, layers, runtime };
    store.add(&mut catalog, &image)?;
    write_atomic(&dir.join("catalog.json"), &serde_json::to_vec_pretty(&catalog)?)?;
    Ok(store)
}

fn build(repo: &Path, store: &Store) -> Result<()> {
    let architecture = deb::architecture()?;
    let packages = deb::Packages::fetch(&store.dir.join("debs"), &["busybox-static"])?;
    let pause = fs::read(compile(repo, &store.dir)?)?;
    let base = store.put_layer(&rootfs::busybox(&packages)?)?;
    let mut own = Tree::default();
    own.add("pause", Entry::File(0o755, pause));
    let own = store.put_layer(&own)?;
    let mut catalog = Catalog { recipe: RECIPE, ..Catalog::default() };
    let env = json!([rootfs::PATH]);
    let images = [
        ("busybox", "latest", &[&base][..], json!({"Env": env, "Cmd": ["sh"]})),
        ("pause", "3.9", &[&own][..], json!({"Entrypoint": ["/pause"]})),
        ("idle", "latest", &[&base, &own][..], json!({"Env": env, "Cmd": ["/pause"]})),
    ];
    for (name, tag, layers, runtime) in images {
        let image = Image { name, tags: &[tag], architecture: &architecture, layers, runtime };
        store.add(&mut catalog, &image)?;
    }
    write_atomic(&store.dir.join("catalog.json"), &serde_json::to_vec_pretty(&catalog)?)
}

/// Compiles the pause program as `keelson-cri`'s build script does.
fn compile(repo: &Path, dir: &Path) -> Result<PathBuf> {
    let output = dir.join("pause");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let link = ["-nostartfiles", "-nostdlib", "-static", "-Wl,--build-id=none", "-Wl,-z,noseparate-code"];
    Cmd::new(rustc)
        .args(["--crate-name", "pause", "--crate-type", "bin", "--edition", "2024", "-Cpanic=abort"])
        .args([
            "-Copt-level=s",
            "-Cstrip=symbols",
            "-Crelocation-model=static",
            "-Ctarget-feature=+crt-static",
        ])
        .args(link.map(|argument| format!("-Clink-arg={argument}")))
        .args([Path::new("-o"), &output, &repo.join(PAUSE)])
        .output()?;
    Ok(output)
}
