//! Mounts: host paths, propagation, recursive read-only, image volumes, image-declared volumes, devices.

use std::path::Path;

use anyhow::{Context, Result};
use cri_shim_api::v1::{self, MountPropagation};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::super::case::{Case, case, holds, refused, same, skip};
use super::super::context::{IDLE, T, image_spec, pod_security, security};

pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    let group = "mounts";
    all.extend([
        case(group, "a host directory, writable and read-only", directory),
        case(group, "a host file", file),
        case(group, "a host path that is a symbolic link is followed", symlink),
        case(group, "a host directory that does not exist is made", made),
        case(group, "a mount inside another mount, in any order", nested),
        case(group, "over /etc/hosts and /dev/shm: the user's mount wins", over_ours),
        case(group, "a mount without a host path is refused", no_host_path),
        case(group, "a host path below a file is refused and named", below_a_file),
        case(group, "a link in the image cannot lead a mount outside of its root", escaping),
    ]);
    let group = "mount propagation";
    all.extend([
        case(group, "PRIVATE: a later mount of the host is not seen", |t| {
            propagate(t, MountPropagation::PropagationPrivate)
        }),
        case(group, "HOST_TO_CONTAINER: a later mount of the host is seen", |t| {
            propagate(t, MountPropagation::PropagationHostToContainer)
        }),
        case(group, "BIDIRECTIONAL: a mount of the container is seen by the host", bidirectional),
        case(group, "BIDIRECTIONAL of a source that is not shared is refused", not_shared),
    ]);
    let group = "recursive read-only mounts";
    all.extend([
        case(group, "recursive_read_only makes submounts read-only", rro),
        case(group, "plain read-only leaves submounts writable", plain_ro),
        case(group, "recursive_read_only without readonly is refused", rro_not_ro),
        case(group, "recursive_read_only with propagation is refused", rro_propagation),
    ]);
    let group = "image volume";
    all.extend([
        case(group, "an image's files are mounted read-only", image_volume),
        case(group, "a writable one is refused", image_volume_writable),
        case(group, "an image named by its digest", image_volume_digest),
        case(group, "a sub-path of an image", image_sub_path),
        case(group, "a sub-path that does not exist is refused", image_sub_path_missing),
        case(group, "a sub-path cannot leave the image", image_sub_path_escape),
        case(group, "programs of the image can be run", image_volume_run),
        case(group, "the image cannot be lost while it is mounted", image_volume_removed),
    ]);
    let group = "image-declared volumes";
    all.extend([
        case(group, "hold the image's content and can be written under a read-only root", declared_volume),
        case(group, "give way to a mount of the user", declared_volume_over),
    ]);
    let group = "devices";
    all.extend([
        case(group, "a host device with permissions rwm", device),
        case(group, "with permissions r it cannot be written", device_read),
        case(group, "a directory of devices", device_directory),
        case(group, "one that does not exist is refused and named", device_missing),
        case(group, "a CDI device brings its environment, device nodes and mounts", cdi_device),
        case(group, "a CDI device that nobody declares is refused and named", cdi_missing),
    ]);
    all
}

fn bind(host: &Path, container: &str) -> v1::Mount {
    v1::Mount {
        container_path: container.to_owned(),
        host_path: host.display().to_string(),
        ..v1::Mount::default()
    }
}

async fn directory(t: T) -> Result<()> {
    let host = t.dir.join("host");
    std::fs::create_dir_all(&host)?;
    std::fs::write(host.join("file"), "from the host\n")?;
    let readonly = v1::Mount { readonly: true, ..bind(&host, "/ro") };
    let script = "cat /rw/file; echo back >/rw/answer; echo x 2>/dev/null >/ro/no && echo written; true";
    let text = t.output(script, |config| config.mounts = vec![bind(&host, "/rw"), readonly]).await?;
    same("the output", text.as_str(), "from the host\n")?;
    same("the answer", std::fs::read_to_string(host.join("answer"))?.as_str(), "back\n")
}

async fn file(t: T) -> Result<()> {
    let host = t.dir.join("file");
    std::fs::write(&host, "from the host\n")?;
    let text = t.output("cat /etc/given", |config| config.mounts = vec![bind(&host, "/etc/given")]).await?;
    same("the output", text.as_str(), "from the host\n")
}

async fn symlink(t: T) -> Result<()> {
    let (host, link) = (t.dir.join("host"), t.dir.join("link"));
    std::fs::create_dir_all(&host)?;
    std::fs::write(host.join("file"), "found\n")?;
    std::os::unix::fs::symlink(&host, &link)?;
    let text = t.output("cat /mnt/file", |config| config.mounts = vec![bind(&link, "/mnt")]).await?;
    same("the output", text.as_str(), "found\n")
}

async fn made(t: T) -> Result<()> {
    let host = t.dir.join("not/there/yet");
    t.output("touch /mnt/file", |config| config.mounts = vec![bind(&host, "/mnt")]).await?;
    anyhow::ensure!(host.join("file").exists(), "{} has no file", host.display());
    Ok(())
}

async fn nested(t: T) -> Result<()> {
    let (outer, inner) = (t.dir.join("outer"), t.dir.join("inner"));
    std::fs::create_dir_all(outer.join("sub"))?;
    std::fs::create_dir_all(&inner)?;
    std::fs::write(inner.join("file"), "inner\n")?;
    let text = t
        .output("cat /mnt/sub/file", |config| {
            config.mounts = vec![bind(&inner, "/mnt/sub"), bind(&outer, "/mnt")];
        })
        .await?;
    same("the output", text.as_str(), "inner\n")
}

async fn over_ours(t: T) -> Result<()> {
    let (hosts, shm) = (t.dir.join("hosts"), t.dir.join("shm"));
    std::fs::write(&hosts, "127.0.0.1 mine\n")?;
    std::fs::create_dir_all(&shm)?;
    std::fs::write(shm.join("file"), "mine too\n")?;
    let text = t
        .output("cat /etc/hosts /dev/shm/file", |config| {
            config.mounts = vec![bind(&hosts, "/etc/hosts"), bind(&shm, "/dev/shm")];
        })
        .await?;
    same("the output", text.as_str(), "127.0.0.1 mine\nmine too\n")
}

/// Creates and starts; the first refusal.
async fn create_and_start(t: &T, config: &v1::ContainerConfig) -> Result<Result<String, tonic::Status>> {
    let pod = t.sandbox().await?;
    Ok(match t.try_create(&pod, config).await {
        Ok(id) => t.try_start(&id).await.map(|()| id),
        Err(status) => Err(status),
    })
}

async fn no_host_path(t: T) -> Result<()> {
    let mut config = t.shell("true");
    config.mounts = vec![v1::Mount { container_path: "/mnt".to_owned(), ..v1::Mount::default() }];
    refused("a mount without a host path", create_and_start(&t, &config).await?).map(drop)
}

async fn below_a_file(t: T) -> Result<()> {
    let file = t.dir.join("file");
    std::fs::write(&file, "")?;
    let mut config = t.shell("true");
    config.mounts = vec![bind(&file.join("below"), "/mnt")];
    let status = refused("a host path below a file", create_and_start(&t, &config).await?)?;
    holds("the error", status.message(), &file.join("below").display().to_string())
}

async fn escaping(t: T) -> Result<()> {
    let reference = t.suite.catalog.reference("conformance/files:latest")?;
    let image = t.pull(&reference).await?;
    let host = t.dir.join("host");
    std::fs::create_dir_all(&host)?;
    let mut config = t.container();
    config.image = Some(image_spec(&image));
    config.command = super::super::context::strings(&["/bin/tool"]);
    let name = format!("kept-inside-{}", std::process::id());
    config.mounts = vec![bind(&host, &format!("/dir/up/{name}"))];
    // Accepted or not: the place is below the container's root.
    drop(create_and_start(&t, &config).await?);
    anyhow::ensure!(!Path::new("/etc").join(&name).exists(), "/etc/{name} was made on the host");
    Ok(())
}

/// A tmpfs of this case, shared with what looks at it.
fn shared_tmpfs(t: &T) -> Result<std::path::PathBuf> {
    let dir = t.dir.join("shared");
    std::fs::create_dir_all(dir.join("below"))?;
    let none = None::<&str>;
    mount(Some("conformance"), &dir, Some("tmpfs"), MsFlags::empty(), none).context("mounting a tmpfs")?;
    let path = dir.clone();
    t.undo(move || {
        for _ in 0..4 {
            umount2(&path.join("below"), MntFlags::MNT_DETACH).ok();
            umount2(&path, MntFlags::MNT_DETACH).ok();
        }
    });
    mount(none, &dir, none, MsFlags::MS_SHARED, none).context("sharing it")?;
    std::fs::create_dir_all(dir.join("below"))?;
    Ok(dir)
}

fn mount_below(dir: &Path) -> Result<()> {
    mount(Some("conformance"), &dir.join("below"), Some("tmpfs"), MsFlags::empty(), None::<&str>)?;
    std::fs::write(dir.join("below/seen"), "seen\n").context("writing into the new mount")
}

async fn propagate(t: T, propagation: MountPropagation) -> Result<()> {
    let dir = shared_tmpfs(&t)?;
    let wanted = v1::Mount { propagation: propagation.into(), ..bind(&dir, "/mnt") };
    let (_, id) = t.idle_with(|config| config.mounts = vec![wanted]).await?;
    mount_below(&dir)?;
    let found = t.sh(&id, "ls /mnt/below").await?;
    let seen = if propagation == MountPropagation::PropagationPrivate { "" } else { "seen" };
    same("files of the host's mount", found.as_str(), seen)
}

async fn privileged(t: &T, mounts: Vec<v1::Mount>) -> Result<Result<String, tonic::Status>> {
    let mut pod = t.pod();
    pod_security(&mut pod).privileged = true;
    let pod = t.run(&pod).await?;
    let mut config = t.shell(IDLE);
    security(&mut config).privileged = true;
    config.mounts = mounts;
    Ok(match t.try_create(&pod, &config).await {
        Ok(id) => t.try_start(&id).await.map(|()| id),
        Err(status) => Err(status),
    })
}

async fn bidirectional(t: T) -> Result<()> {
    let dir = shared_tmpfs(&t)?;
    let both = MountPropagation::PropagationBidirectional.into();
    let wanted = v1::Mount { propagation: both, ..bind(&dir, "/mnt") };
    let id = privileged(&t, vec![wanted]).await?.context("the container")?;
    t.sh(&id, "mount -t tmpfs inside /mnt/below && echo seen >/mnt/below/file").await?;
    same("the file", std::fs::read_to_string(dir.join("below/file"))?.as_str(), "seen\n")
}

async fn not_shared(t: T) -> Result<()> {
    let dir = shared_tmpfs(&t)?;
    mount(None::<&str>, &dir, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    let both = MountPropagation::PropagationBidirectional.into();
    let wanted = v1::Mount { propagation: both, ..bind(&dir, "/mnt") };
    refused("a source that is not shared", privileged(&t, vec![wanted]).await?).map(drop)
}

async fn written(t: &T, change: impl FnOnce(&mut v1::Mount)) -> Result<String> {
    let dir = shared_tmpfs(t)?;
    mount_below(&dir)?;
    let mut wanted = v1::Mount { readonly: true, ..bind(&dir, "/mnt") };
    change(&mut wanted);
    let script =
        "echo x 2>/dev/null >/mnt/top && echo top; echo x 2>/dev/null >/mnt/below/deep && echo below; true";
    Ok(t.output(script, |config| config.mounts = vec![wanted]).await?.trim().replace('\n', " "))
}

async fn rro(t: T) -> Result<()> {
    t.suite.facts.need_rro()?;
    same("what could be written", written(&t, |mount| mount.recursive_read_only = true).await?.as_str(), "")
}

async fn plain_ro(t: T) -> Result<()> {
    same("what could be written", written(&t, |_| ()).await?.as_str(), "below")
}

async fn rro_not_ro(t: T) -> Result<()> {
    t.suite.facts.need_rro()?;
    let mut config = t.shell("true");
    config.mounts = vec![v1::Mount { recursive_read_only: true, ..bind(&t.dir, "/mnt") }];
    refused("recursive_read_only alone", create_and_start(&t, &config).await?).map(drop)
}

async fn rro_propagation(t: T) -> Result<()> {
    t.suite.facts.need_rro()?;
    let propagation = MountPropagation::PropagationHostToContainer.into();
    let mut config = t.shell("true");
    let wanted = v1::Mount { recursive_read_only: true, readonly: true, propagation, ..bind(&t.dir, "/mnt") };
    config.mounts = vec![wanted];
    refused("recursive_read_only with propagation", create_and_start(&t, &config).await?).map(drop)
}

async fn image_mount(t: &T, sub_path: &str) -> Result<v1::Mount> {
    let image = t.pull(&t.suite.catalog.reference("conformance/files:latest")?).await?;
    Ok(v1::Mount {
        container_path: "/vol".to_owned(),
        readonly: true,
        image: Some(image_spec(&image)),
        image_sub_path: sub_path.to_owned(),
        ..v1::Mount::default()
    })
}

async fn image_volume(t: T) -> Result<()> {
    let wanted = image_mount(&t, "").await?;
    let script = "cat /vol/top /vol/dir/inner; echo x 2>/dev/null >/vol/new && echo written; true";
    same(
        "the output",
        t.output(script, |config| config.mounts = vec![wanted]).await?.as_str(),
        "top\ninner\n",
    )
}

async fn image_sub_path(t: T) -> Result<()> {
    let wanted = image_mount(&t, "dir").await?;
    same(
        "the output",
        t.output("cat /vol/inner", |config| config.mounts = vec![wanted]).await?.as_str(),
        "inner\n",
    )
}

async fn image_volume_writable(t: T) -> Result<()> {
    need_image_volumes(&t).await?;
    let mut config = t.shell("true");
    config.mounts = vec![v1::Mount { readonly: false, ..image_mount(&t, "").await? }];
    refused("a writable image volume", create_and_start(&t, &config).await?).map(drop)
}

async fn image_volume_digest(t: T) -> Result<()> {
    let mut wanted = image_mount(&t, "").await?;
    let image = t.image(&wanted.image.clone().unwrap_or_default().image).await?.context("no status")?;
    let digest = image.repo_digests.first().context("no digest")?;
    wanted.image = Some(image_spec(digest));
    let text = t.output("cat /vol/top", |config| config.mounts = vec![wanted]).await?;
    same("the output", text.as_str(), "top\n")
}

/// Skips where the endpoint does not know image volumes at all, which then fail for another reason.
async fn need_image_volumes(t: &T) -> Result<()> {
    let mut config = t.shell("true");
    config.mounts = vec![image_mount(t, "").await?];
    if create_and_start(t, &config).await?.is_err() {
        return skip("the endpoint mounts no image volume at all (a case of its own)");
    }
    Ok(())
}

async fn image_sub_path_missing(t: T) -> Result<()> {
    need_image_volumes(&t).await?;
    let mut config = t.shell("true");
    config.mounts = vec![image_mount(&t, "nobody-has-this").await?];
    refused("a sub-path that does not exist", create_and_start(&t, &config).await?).map(drop)
}

async fn image_sub_path_escape(t: T) -> Result<()> {
    need_image_volumes(&t).await?;
    for sub_path in ["../..", "dir/up", "/etc"] {
        let wanted = image_mount(&t, sub_path).await?;
        let mut config = t.shell("ls /vol | grep -c passwd; sleep 3600");
        config.mounts = vec![wanted];
        let pod = t.sandbox().await?;
        // Refused or resolved inside the image: both are fine.
        if let Ok(id) = t.try_create(&pod, &config).await
            && t.try_start(&id).await.is_ok()
        {
            same(sub_path, t.sh(&id, "ls /vol | grep -c passwd; true").await?.as_str(), "0")?;
        }
    }
    Ok(())
}

async fn image_volume_run(t: T) -> Result<()> {
    let wanted = image_mount(&t, "").await?;
    same(
        "the output",
        t.output("/vol/bin/tool", |config| config.mounts = vec![wanted]).await?.as_str(),
        "tool ran\n",
    )
}

async fn image_volume_removed(t: T) -> Result<()> {
    let reference = t.suite.catalog.reference("conformance/image-user:1")?;
    let image = t.try_pull(&reference, None).await.context("PullImage")?;
    let mut wanted = image_mount(&t, "").await?;
    wanted.image = Some(image_spec(&image));
    let (_, id) = t.idle_with(|config| config.mounts = vec![wanted]).await?;
    // Whether it is refused or only unnamed is the endpoint's choice.
    t.remove_image(&reference).await.ok();
    same("the file", t.sh(&id, "cat /vol/mark").await?.as_str(), "user")
}

async fn declared(t: &T, change: impl FnOnce(&mut v1::ContainerConfig)) -> Result<String> {
    let image = t.pull(&t.suite.catalog.reference("conformance/settings:latest")?).await?;
    let script = "cat /data/volume/* && echo x >/data/volume/new && echo written";
    t.output(script, |config| {
        config.image = Some(image_spec(&image));
        security(config).readonly_rootfs = true;
        change(config);
    })
    .await
}

async fn declared_volume(t: T) -> Result<()> {
    same(
        "the output",
        declared(&t, |config| config.working_dir = "/".to_owned()).await?.as_str(),
        "seeded\nwritten\n",
    )
}

async fn declared_volume_over(t: T) -> Result<()> {
    let host = t.dir.join("host");
    std::fs::create_dir_all(&host)?;
    std::fs::write(host.join("mine"), "mine\n")?;
    let text = declared(&t, |config| {
        config.working_dir = "/".to_owned();
        config.mounts = vec![bind(&host, "/data/volume")];
    });
    same("the output", text.await?.as_str(), "mine\nwritten\n")?;
    anyhow::ensure!(host.join("new").exists(), "the user's directory was not written");
    Ok(())
}

pub(super) fn one_device(host: &str, container: &str, permissions: &str) -> Vec<v1::Device> {
    vec![v1::Device {
        container_path: container.to_owned(),
        host_path: host.to_owned(),
        permissions: permissions.to_owned(),
    }]
}

async fn device(t: T) -> Result<()> {
    let script = "head -c 4 /dev/given | wc -c; echo x >/dev/given && echo written";
    let text =
        t.output(script, |config| config.devices = one_device("/dev/zero", "/dev/given", "rwm")).await?;
    same("the output", text.as_str(), "4\nwritten\n")
}

async fn device_read(t: T) -> Result<()> {
    // runc 1.1 allows some devices to every container, /dev/net/tun among them.
    if !Path::new("/dev/kmsg").exists() {
        return skip("/dev/kmsg is missing: no harmless device that containers lack by default");
    }
    let script = "exec 3<>/dev/given 2>/dev/null && echo opened for writing; true";
    let text = t.output(script, |config| config.devices = one_device("/dev/kmsg", "/dev/given", "r")).await;
    // The shell ends at a failed redirection of exec.
    if let Ok(text) = text {
        same("the output", text.as_str(), "")?;
    }
    Ok(())
}

async fn device_directory(t: T) -> Result<()> {
    if !Path::new("/dev/net").is_dir() {
        return skip("/dev/net is missing");
    }
    let text =
        t.output("ls /dev/net", |config| config.devices = one_device("/dev/net", "/dev/net", "rwm")).await?;
    holds("the directory", &text, "tun")
}

async fn device_missing(t: T) -> Result<()> {
    let mut config = t.shell("true");
    config.devices = one_device("/dev/nobody-has-this", "/dev/given", "rwm");
    let status = refused("a device that does not exist", create_and_start(&t, &config).await?)?;
    holds("the error", status.message(), "nobody-has-this")
}

/// Declares a device where every runtime looks for it; it is undeclared with the case.
fn declare_cdi(t: &T) -> Result<String> {
    let kind = format!("keelson.test/conformance-{}", std::process::id());
    let given = t.dir.join("given");
    std::fs::create_dir_all(&given)?;
    std::fs::write(given.join("file"), "from the vendor\n")?;
    let text = serde_json::json!({
        "cdiVersion": "0.5.0", "kind": kind,
        "devices": [{"name": "one", "containerEdits": {
            "env": ["VENDOR=yes"],
            "deviceNodes": [{"path": "/dev/vendor", "hostPath": "/dev/zero", "permissions": "rw"}],
            "mounts": [{"hostPath": given, "containerPath": "/vendor", "options": ["ro", "bind"]}],
        }}],
    });
    let dir = Path::new("/var/run/cdi");
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let file = dir.join(format!("keelson-conformance-{}.json", std::process::id()));
    // Under its name only when it is whole.
    let part = file.with_extension("part");
    std::fs::write(&part, text.to_string()).with_context(|| format!("writing {}", part.display()))?;
    std::fs::rename(&part, &file).with_context(|| format!("writing {}", file.display()))?;
    // One that is left declares a device that nobody asks for.
    t.undo(move || drop(std::fs::remove_file(file)));
    Ok(format!("{kind}=one"))
}

async fn cdi_device(t: T) -> Result<()> {
    let name = declare_cdi(&t)?;
    let script = "echo $VENDOR; head -c 4 /dev/vendor | wc -c; cat /vendor/file; touch /vendor/x 2>/dev/null && echo written; true";
    let text = t.output(script, |config| config.cdi_devices = vec![v1::CdiDevice { name }]).await?;
    same("the output", text.as_str(), "yes\n4\nfrom the vendor\n")
}

async fn cdi_missing(t: T) -> Result<()> {
    let mut config = t.shell("true");
    config.cdi_devices = vec![v1::CdiDevice { name: "vendor.example/class=nobody-has-this".to_owned() }];
    let status = refused("an undeclared CDI device", create_and_start(&t, &config).await?)?;
    holds("the error", status.message(), "nobody-has-this")
}
