//! What the node's systemd does while containers run.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result};

use super::super::case::{Case, case, same, skip};
use super::super::context::{IDLE, Pod, T, resources};
use super::mounts::one_device;

pub(crate) fn cases() -> Vec<Case> {
    // Everything that systemd manages is realized anew: nothing else is to be looked at meanwhile.
    vec![case("resources", "systemctl daemon-reload takes back neither devices nor limits", reload).serial()]
}

/// A device that no container has unless it is given one. Opening it for writing needs no capability, and writes nothing.
const DEVICE: &str = "/dev/kmsg";
/// Says whether the device can be used, made first where it was not given, and the limits.
const LOOK: &str = "[ -e /dev/given ] || mknod /dev/given c 1 11 || exit 9; \
                    if (: >/dev/given) 2>/dev/null; then echo usable; else echo refused; fi; cd /sys/fs/cgroup; \
                    cat memory.max memory/memory.limit_in_bytes cpu.max cpu/cpu.cfs_quota_us pids.max pids/pids.max 2>/dev/null; true";

/// A container with limits, with the device or without.
async fn container(t: &T, pod: &Pod, with_device: bool) -> Result<String> {
    let mut config = t.shell(IDLE);
    let wanted = resources(&mut config);
    wanted.memory_limit_in_bytes = 96 << 20;
    (wanted.cpu_quota, wanted.cpu_period) = (70_000, 100_000);
    if with_device {
        config.devices = one_device(DEVICE, "/dev/given", "rwm");
    }
    t.launch(pod, &config).await
}

/// Says which of them may use the device, and the limits of all.
async fn look(t: &T, ids: &[String]) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    for id in ids {
        seen.push(t.sh(id, LOOK).await?);
    }
    Ok(seen)
}

async fn daemon_reload() -> Result<()> {
    let mut command = tokio::process::Command::new("systemctl");
    command.arg("daemon-reload").stdin(Stdio::null()).kill_on_drop(true);
    let output = command.output().await.context("systemctl")?;
    anyhow::ensure!(
        output.status.success(),
        "systemctl daemon-reload: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

async fn reload(t: T) -> Result<()> {
    if !Path::new("/run/systemd/system").is_dir() {
        return skip("systemd does not run on this host");
    }
    if !Path::new(DEVICE).exists() {
        return skip(format!("{DEVICE} is missing: no harmless device that containers lack by default"));
    }
    let pod = t.sandbox().await?;
    let mut ids = vec![container(&t, &pod, true).await?, container(&t, &pod, false).await?];
    let before = look(&t, &ids).await?;
    let states = |seen: &[String]| -> Vec<String> {
        seen.iter().map(|text| text.lines().next().unwrap_or_default().to_owned()).collect()
    };
    same("the device before", states(&before), vec!["usable", "refused"])?;
    daemon_reload().await?;
    same("devices and limits after it", look(&t, &ids).await?, before.clone())?;
    // A new unit in the pod's slice has systemd write the slice's, and its neighbours', settings once more.
    ids.push(container(&t, &pod, true).await?);
    let with_another = look(&t, &ids).await?;
    same("devices and limits beside a container made afterwards", &with_another[..2], &before[..])?;
    same("the new one's", &with_another[2], &before[0])?;
    daemon_reload().await?;
    same("devices and limits after another", look(&t, &ids).await?, with_another)
}
