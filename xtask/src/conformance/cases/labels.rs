//! Security context: AppArmor and SELinux.

use std::process::Command;

use anyhow::{Context, Result};
use cri_shim_api::v1;
use cri_shim_api::v1::security_profile::ProfileType;

use super::super::case::{Case, case, holds, refused, same, skip};
use super::super::context::{IDLE, T, security};
use super::seccomp::profile;
use super::security::{capability, make_privileged, privileged_pod};

pub(crate) fn cases() -> Vec<Case> {
    let group = "security: AppArmor and SELinux";
    vec![
        case(group, "AppArmor RuntimeDefault confines", apparmor_default),
        case(group, "AppArmor RuntimeDefault refuses mounts even with SYS_ADMIN", apparmor_mounts),
        case(group, "AppArmor Unconfined does not", apparmor_unconfined),
        case(
            group,
            "AppArmor Localhost of a loaded profile confines as that profile says",
            apparmor_localhost,
        ),
        case(group, "AppArmor Localhost holds for exec, too", apparmor_exec),
        case(
            group,
            "AppArmor Localhost of a profile that is not loaded is refused and named",
            apparmor_missing,
        ),
        case(
            group,
            "AppArmor of a privileged container is unconfined, unless a profile is named",
            apparmor_privileged,
        ),
        case(
            group,
            "AppArmor RuntimeDefault where the kernel has none is refused with that reason",
            apparmor_absent,
        ),
        case(group, "SELinux labels are set", selinux),
    ]
}

const LABEL: &str = "cat /proc/self/attr/current 2>/dev/null; echo";
/// What a profile of ours forbids, and the name under which it is tried.
const FORBIDDEN: &str = "if echo x > /forbidden; then echo written; else echo refused; fi 2>/dev/null; echo x > /other && echo fine";

async fn apparmor_default(t: T) -> Result<()> {
    t.suite.facts.need_apparmor()?;
    let text = t.output(LABEL, |c| security(c).apparmor = profile(ProfileType::RuntimeDefault, "")).await?;
    holds("the label", &text, "(enforce)")
}

async fn apparmor_mounts(t: T) -> Result<()> {
    t.suite.facts.need_apparmor()?;
    let script = "mkdir /m; if mount -t tmpfs none /m 2>/dev/null; then echo mounted; else echo refused; fi";
    let with = |kind| {
        t.output(script, move |config| {
            security(config).apparmor = profile(kind, "");
            capability(config, &["SYS_ADMIN"], &[]);
        })
    };
    same("with the default profile", with(ProfileType::RuntimeDefault).await?.trim(), "refused")?;
    same("without a profile", with(ProfileType::Unconfined).await?.trim(), "mounted")
}

async fn apparmor_unconfined(t: T) -> Result<()> {
    t.suite.facts.need_apparmor()?;
    let text = t.output(LABEL, |c| security(c).apparmor = profile(ProfileType::Unconfined, "")).await?;
    holds("the label", &text, "unconfined")
}

/// Loads a profile that forbids writing one file; it is unloaded with the case.
fn load(t: &T, name: &str) -> Result<String> {
    let name = format!("keelson-conformance-{name}-{}", std::process::id());
    let text = format!(
        "profile {name} flags=(attach_disconnected,mediate_deleted) {{\n  file,\n  capability,\n  network,\n  \
         signal,\n  ptrace,\n  unix,\n  deny /forbidden wl,\n}}\n"
    );
    let file = t.dir.join("profile");
    std::fs::write(&file, &text)?;
    let parse = |option: &str, file: &std::path::Path| {
        Command::new("apparmor_parser").args([option, "--skip-cache"]).arg(file).output()
    };
    let Ok(output) = parse("--replace", &file) else { return skip("there is no apparmor_parser here") };
    anyhow::ensure!(
        output.status.success(),
        "apparmor_parser: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    // The case's own directory may be gone when it is undone.
    let kept = std::env::temp_dir().join(&name);
    std::fs::write(&kept, text).with_context(|| format!("writing {}", kept.display()))?;
    t.undo(move || {
        // One that is left confines nothing.
        drop(parse("--remove", &kept));
        drop(std::fs::remove_file(&kept));
    });
    Ok(name)
}

async fn apparmor_localhost(t: T) -> Result<()> {
    t.suite.facts.need_apparmor()?;
    let name = load(&t, "file")?;
    let script = format!("{FORBIDDEN}; {LABEL}");
    let text = t.output(&script, |c| security(c).apparmor = profile(ProfileType::Localhost, &name)).await?;
    holds("the label", &text, &format!("{name} (enforce)"))?;
    holds("the forbidden file", &text, "refused")?;
    holds("another file", &text, "fine")
}

async fn apparmor_exec(t: T) -> Result<()> {
    t.suite.facts.need_apparmor()?;
    let name = load(&t, "exec")?;
    let (_, id) =
        t.idle_with(|config| security(config).apparmor = profile(ProfileType::Localhost, &name)).await?;
    let text = t.sh(&id, &format!("{FORBIDDEN}; {LABEL}")).await?;
    holds("the label", &text, &format!("{name} (enforce)"))?;
    holds("the forbidden file", &text, "refused")
}

async fn apparmor_missing(t: T) -> Result<()> {
    t.suite.facts.need_apparmor()?;
    let pod = t.sandbox().await?;
    let mut config = t.shell(IDLE);
    security(&mut config).apparmor = profile(ProfileType::Localhost, "nobody-has-this");
    let result = match t.try_create(&pod, &config).await {
        Ok(id) => t.try_start(&id).await,
        Err(status) => Err(status),
    };
    holds("the error", refused("a profile that is not loaded", result)?.message(), "nobody-has-this")
}

async fn apparmor_privileged(t: T) -> Result<()> {
    t.suite.facts.need_apparmor()?;
    let pod = privileged_pod(&t).await?;
    let text = t
        .output_in(&pod, LABEL, |config| {
            make_privileged(config);
            security(config).apparmor = profile(ProfileType::RuntimeDefault, "");
        })
        .await?;
    holds("the label with RuntimeDefault", &text, "unconfined")?;
    let name = load(&t, "privileged")?;
    let text = t
        .output_in(&pod, LABEL, |config| {
            make_privileged(config);
            security(config).apparmor = profile(ProfileType::Localhost, &name);
        })
        .await?;
    holds("the label with a profile of its own", &text, &format!("{name} (enforce)"))
}

async fn apparmor_absent(t: T) -> Result<()> {
    if t.suite.facts.apparmor {
        return skip("the kernel has AppArmor");
    }
    let pod = t.sandbox().await?;
    let mut config = t.shell("true");
    security(&mut config).apparmor = profile(ProfileType::RuntimeDefault, "");
    let status = refused("an AppArmor profile", t.try_create(&pod, &config).await)?;
    holds("the error", &status.message().to_lowercase(), "apparmor")
}

async fn selinux(t: T) -> Result<()> {
    t.suite.facts.need_selinux()?;
    let text = t
        .output(LABEL, |config| {
            let level = "s0:c4,c5".to_owned();
            security(config).selinux_options = Some(v1::SeLinuxOption { level, ..Default::default() });
        })
        .await?;
    holds("the label", &text, "s0:c4,c5")
}
