//! What the Debian guest boots from: the first stage, the system disk, and the disk of a run.
//!
//! The system disk is made once by mmdebstrap and kept until the package list, the recipe or the kernel changes; what this
//! checkout built is on the second disk, made for each run.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::cache;
use super::cpio::Archive;
use super::guest;
use super::kernel::Kernel;
use super::programs::Program;
use crate::cmd::{Cmd, step};
use crate::images::deb::Packages;

/// Raised whenever [`build_system`] changes.
const RECIPE: u32 = 3;
/// What the guest has beside Debian's minimal system.
const PACKAGES: &str = "systemd-sysv,udev,dbus,kmod,iproute2,nftables,procps,apparmor,busybox-static,containerd,\
                        runc,crun,criu,iptables,curl,conntrack,tcpdump,nfs-common,nfs-kernel-server";
/// Modules of the first stage: enough to reach the disk.
const BOOT_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "virtio_rng", "ext4", "crc32c_generic"];
/// cgroup drivers, each with an instance of keelson-cri of its own.
pub(super) const DRIVERS: &[&str] = &["systemd", "cgroupfs"];
/// What the conformance suite's images are made of, below the checkout: the guest has no network to fetch it from.
pub(super) const SUITE_IMAGES: &str = "target/conformance";
/// The node's images, below the checkout.
const NODE_IMAGES: &str = "target/images";
/// Room on the second disk beside what is put there, in MiB: nothing grows on it, but a file system needs some itself.
const SPARE: u64 = 128;

/// The first stage: modules for the disk, and our program.
pub(super) fn first_stage(repo: &Path, kernel: &Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    super::add_modules(kernel, BOOT_MODULES, &mut archive)?;
    archive.program(guest::SELF, &std::env::current_exe()?)?;
    let packages = Packages::fetch(&cache(repo).join("debs"), &["busybox-static"])?;
    archive.file(guest::BUSYBOX, &packages.tree("busybox-static").join("bin/busybox"))?;
    archive.finish()
}

/// The system disk, made when there is none of this recipe.
pub(super) fn system(repo: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let key = Sha256::digest(format!("{RECIPE} {PACKAGES} {}", kernel.version));
    let name: String = key.iter().take(6).map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    let image = cache(repo).join(format!("debian-{name}.img"));
    if !image.is_file() {
        step("making the Debian image (two minutes)", || build_system(repo, kernel, &image))?;
    }
    Ok(image)
}

fn build_system(repo: &Path, kernel: &Kernel, image: &Path) -> Result<()> {
    for old in fs::read_dir(cache(repo))?.flatten() {
        if old.file_name().to_string_lossy().starts_with("debian-") && old.path().is_file() {
            fs::remove_file(old.path())?;
        }
    }
    let root = cache(repo).join("rootfs");
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))?;
    }
    let excluded =
        ["man", "doc", "locale", "info"].map(|dir| format!("--dpkgopt=path-exclude=/usr/share/{dir}/*"));
    Cmd::new("mmdebstrap")
        .args(["--quiet", "--mode=root", "--variant=minbase"])
        .args([format!("--include={PACKAGES}")])
        .args(excluded)
        .args(["bookworm".as_ref(), root.as_os_str()])
        .args(apt_sources())
        .output()?;
    Cmd::new("cp")
        .args(["-a".as_ref(), kernel.tree.join("lib/modules").as_os_str(), root.join("lib").as_os_str()])
        .output()?;
    Cmd::new("chroot").args([root.as_os_str(), "depmod".as_ref(), kernel.version.as_ref()]).output()?;
    configure(&root)?;
    let partial = image.with_extension("partial");
    fs::remove_file(&partial).ok();
    Cmd::new("mkfs.ext4")
        .args(["-q", "-F", "-L", "root", "-O", "^has_journal", "-d"])
        .args([&root, &partial])
        .args(["3G"])
        .output()?;
    fs::rename(&partial, image)?;
    fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))
}

/// The host's own sources, so that its mirror and keys are used.
fn apt_sources() -> Vec<PathBuf> {
    ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"]
        .into_iter()
        .map(PathBuf::from)
        .filter(|file| file.is_file())
        .take(1)
        .collect()
}

/// Services and mounts of the guest; everything that changes between runs is on the second disk.
fn configure(root: &Path) -> Result<()> {
    let write = |path: &str, text: &str| -> Result<()> {
        let file = root.join(path);
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
    };
    write("etc/fstab", "/dev/vda / ext4 rw 0 0\n/dev/vdb /keelson ext4 rw 0 0\n")?;
    write("etc/hostname", "keelson-vm\n")?;
    write("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 keelson-vm\n")?;
    write(
        "etc/systemd/system/containerd.service.d/keelson.conf",
        "[Unit]\nRequiresMountsFor=/keelson\n[Service]\nEnvironment=PATH=/keelson/bin:/usr/sbin:/usr/bin:/sbin:/bin\n",
    )?;
    write(
        "etc/systemd/system/keelson-cri@.service",
        "[Unit]\nAfter=containerd.service\nRequires=containerd.service\nRequiresMountsFor=/keelson\n\
         [Service]\nEnvironment=PATH=/keelson/bin:/usr/sbin:/usr/bin:/sbin:/bin\nKillMode=process\nDelegate=yes\n\
         ExecStartPre=/bin/mkdir -p /run/keelson/%i\n\
         ExecStart=/keelson/bin/keelson-cri --config /keelson/etc/cri-%i.yaml\n\
         StandardError=journal+console\n[Install]\nWantedBy=multi-user.target\n",
    )?;
    write(
        "etc/systemd/system/keelson-vm.service",
        "[Unit]\nAfter=keelson-cri@systemd.service keelson-cri@cgroupfs.service\nRequiresMountsFor=/keelson\n\
         [Service]\nType=oneshot\nExecStart=/keelson/bin/xtask vm-guest\n\
         ExecStopPost=/sbin/poweroff -f\nStandardOutput=tty\nStandardError=tty\nTTYPath=/dev/ttyS0\n\
         [Install]\nWantedBy=multi-user.target\n",
    )?;
    let wants = root.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    for (unit, link) in [
        ("keelson-vm.service", "keelson-vm.service"),
        ("keelson-cri@.service", "keelson-cri@systemd.service"),
        ("keelson-cri@.service", "keelson-cri@cgroupfs.service"),
    ] {
        symlink(Path::new("/etc/systemd/system").join(unit), wants.join(link))?;
    }
    // Started by the test that needs it.
    fs::remove_file(wants.join("nfs-server.service")).ok();
    // Nobody logs in, nothing is updated, and no network is waited for.
    for unit in [
        "getty.target",
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "dpkg-db-backup.timer",
        "e2scrub_all.timer",
        "systemd-timesyncd.service",
        "systemd-networkd-wait-online.service",
        "nfs-blkmap.service",
    ] {
        let link = root.join("etc/systemd/system").join(unit);
        fs::remove_file(&link).ok();
        symlink("/dev/null", &link).with_context(|| format!("masking {unit}"))?;
    }
    fs::create_dir_all(root.join("keelson"))?;
    Ok(())
}

/// The second disk: our executables, the images that the suite serves, configuration, and the lists of jobs by name.
pub(super) fn payload(
    repo: &Path,
    programs: &[Program],
    lists: &[(String, Vec<u8>)],
    tree: &Path,
    disk: &Path,
) -> Result<()> {
    if tree.exists() {
        fs::remove_dir_all(tree)?;
    }
    for dir in ["bin", "etc", "cni/bin", "xtask", "target"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    for name in crate::binaries::EXECUTABLES {
        let file = crate::binaries::file(repo, name);
        fs::copy(&file, tree.join("bin").join(name))
            .with_context(|| format!("copying {}", file.display()))?;
        // Where a checkout has it.
        let link = crate::binaries::file(tree, name);
        fs::create_dir_all(link.parent().context("an executable without a directory")?)?;
        symlink(Path::new("/keelson/bin").join(name), link)?;
    }
    node_images(repo, tree)?;
    fs::copy(std::env::current_exe()?, tree.join("bin/xtask"))?;
    // Tests name executables by where cargo built them: the guest gets the same paths as links (see `Planned::job`).
    for program in programs {
        let name = program.file.file_name().context("a program without a name")?;
        fs::copy(&program.file, tree.join("bin").join(name))?;
    }
    // What makes the suite take this for a checkout, with its images made already.
    fs::write(tree.join("Cargo.toml"), "")?;
    fs::write(tree.join("xtask/Cargo.toml"), "")?;
    let known = |name: &str| -> Result<String> {
        let file = repo.join("xtask/src/conformance").join(name);
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    };
    let ours = known("keelson.txt")?;
    for (handler, more) in
        [("keelson", String::new()), ("runc", String::new()), ("crun", known("keelson-crun.txt")?)]
    {
        fs::write(tree.join(format!("known-{handler}.txt")), format!("{ours}{more}"))?;
    }
    let packages = Path::new(SUITE_IMAGES).join("debs");
    fs::create_dir_all(tree.join(SUITE_IMAGES))?;
    Cmd::new("cp")
        .args(["-a".as_ref(), repo.join(&packages).as_os_str(), tree.join(SUITE_IMAGES).as_os_str()])
        .output()?;
    for name in ["keelson-bridge", "keelson-ipam", "keelson-loopback"] {
        symlink("/keelson/bin/keelson-cni", tree.join("cni/bin").join(name))?;
    }
    for (index, driver) in DRIVERS.iter().enumerate() {
        let config = serde_norway::to_string(&cri_config(driver))?;
        fs::write(tree.join("etc").join(format!("cri-{driver}.yaml")), config)?;
        let networks = tree.join("etc").join(format!("net-{driver}"));
        fs::create_dir_all(&networks)?;
        fs::write(networks.join("10-pods.conflist"), serde_json::to_vec_pretty(&network(driver, index))?)?;
    }
    for (name, list) in lists {
        fs::write(tree.join(name), list).with_context(|| format!("writing {name}"))?;
    }
    fs::remove_file(disk).ok();
    let size = Cmd::new("du").args(["-sm".as_ref(), tree.as_os_str()]).output()?;
    let size: u64 =
        size.split_whitespace().next().unwrap_or_default().parse().context("reading du's figure")?;
    Cmd::new("mkfs.ext4")
        .args(["-q", "-F", "-L", "keelson", "-O", "^has_journal", "-m", "0", "-d"])
        .args([tree, disk])
        .args([format!("{}M", size + size / 8 + SPARE)])
        .output()?;
    fs::remove_dir_all(tree).context("removing the payload's tree")
}

/// The images of `up`, for the pods of a node in the guest.
fn node_images(repo: &Path, tree: &Path) -> Result<()> {
    let (from, to) = (repo.join(NODE_IMAGES), tree.join(NODE_IMAGES));
    crate::images::ensure(&from)?;
    fs::create_dir_all(&to)?;
    Cmd::new("cp").args(["-a".into(), from.join("blobs"), from.join("catalog.json"), to]).output().map(drop)
}

fn cri_config(driver: &str) -> serde_json::Value {
    json!({
        "listen": format!("/run/keelson/{driver}/cri.sock"),
        "containerdSocket": "/run/containerd/containerd.sock",
        "containerdNamespace": format!("keelson-{driver}"),
        "stateDir": format!("/run/keelson/{driver}/cri"),
        "rootDir": format!("/var/lib/keelson/{driver}/cri"),
        "netnsDir": format!("/run/keelson/{driver}/netns"),
        "cni": {
            "confDir": format!("/keelson/etc/net-{driver}"),
            "binDir": "/keelson/cni/bin",
            "cacheDir": format!("/run/keelson/{driver}/cni-cache"),
        },
        "registryConfigDir": "/etc/containerd/certs.d",
        "streaming": {"address": "127.0.0.1", "port": 0},
        "cgroupDriver": driver,
    })
}

fn network(driver: &str, index: usize) -> serde_json::Value {
    json!({
        "cniVersion": "1.1.0",
        "name": format!("pods-{driver}"),
        "plugins": [{
            "type": "keelson-bridge",
            "bridge": format!("kvm{index}"),
            "isGateway": true,
            "isDefaultGateway": true,
            "hairpinMode": true,
            "ipam": {
                "type": "keelson-ipam",
                "dataDir": format!("/run/keelson/{driver}/ipam"),
                "ranges": [[{"subnet": format!("10.8{index}.0.0/16")}]],
            },
        }],
    })
}
