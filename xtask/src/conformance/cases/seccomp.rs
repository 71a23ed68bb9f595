//! Security context: seccomp profiles.

use anyhow::Result;
use cri_shim_api::v1;
use cri_shim_api::v1::security_profile::ProfileType;

use super::super::case::{Case, case, holds, refused, same};
use super::super::context::{T, security};
use super::security::{capability, make_privileged, privileged_pod};

pub(crate) fn cases() -> Vec<Case> {
    let group = "security: seccomp";
    vec![
        case(group, "RuntimeDefault filters: unshare is refused", seccomp_default),
        case(group, "RuntimeDefault lets ordinary programs work", seccomp_ordinary),
        case(group, "RuntimeDefault grants by capability: SYS_ADMIN may unshare", seccomp_admin),
        case(group, "Unconfined filters nothing", seccomp_unconfined),
        case(group, "no profile at all is Unconfined", seccomp_none),
        case(group, "Localhost: a profile that refuses sethostname", seccomp_localhost),
        case(group, "Localhost: a file that does not exist is refused and named", seccomp_missing),
        case(group, "Localhost: a file that is no profile is refused", seccomp_broken),
        case(group, "privileged is Unconfined whatever the profile", seccomp_privileged),
    ]
}

#[allow(clippy::unnecessary_wraps, reason = "the fields it is for are optional")]
pub(super) fn profile(kind: ProfileType, file: &str) -> Option<v1::SecurityProfile> {
    Some(v1::SecurityProfile { profile_type: kind.into(), localhost_ref: file.to_owned() })
}

/// The mode in `/proc/self/status`, and whether a namespace for the host name could be made: AppArmor has no say in that.
const FILTER: &str = "grep Seccomp: /proc/self/status; if unshare -u true 2>/dev/null; then echo unshared; else echo refused; fi";

async fn filtered(t: &T, seccomp: Option<v1::SecurityProfile>, add: &[&str]) -> Result<String> {
    let text = t.output(FILTER, |config| {
        security(config).seccomp = seccomp;
        capability(config, add, &[]);
    });
    Ok(text.await?.replace('\t', "").replace('\n', " ").trim().to_owned())
}

async fn seccomp_default(t: T) -> Result<()> {
    let found = filtered(&t, profile(ProfileType::RuntimeDefault, ""), &[]).await?;
    same("mode and unshare", found.as_str(), "Seccomp:2 refused")
}

async fn seccomp_ordinary(t: T) -> Result<()> {
    let script = "mkdir /d && touch /d/f && mv /d/f /d/g && ls -l /d && rm -r /d && sleep 0.01 && echo fine | tr a-z A-Z";
    let text = t.output(script, |c| security(c).seccomp = profile(ProfileType::RuntimeDefault, "")).await?;
    holds("the output", &text, "FINE")
}

async fn seccomp_admin(t: T) -> Result<()> {
    let found = filtered(&t, profile(ProfileType::RuntimeDefault, ""), &["SYS_ADMIN"]).await?;
    same("mode and unshare", found.as_str(), "Seccomp:2 unshared")
}

async fn seccomp_unconfined(t: T) -> Result<()> {
    let found = filtered(&t, profile(ProfileType::Unconfined, ""), &["SYS_ADMIN"]).await?;
    same("mode and unshare", found.as_str(), "Seccomp:0 unshared")
}

async fn seccomp_none(t: T) -> Result<()> {
    same("mode and unshare", filtered(&t, None, &["SYS_ADMIN"]).await?.as_str(), "Seccomp:0 unshared")
}

async fn seccomp_localhost(t: T) -> Result<()> {
    let file = t.dir.join("profile.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["sethostname"],"action":"SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(&file, text)?;
    let seccomp = profile(ProfileType::Localhost, &file.display().to_string());
    let script = "hostname other 2>/dev/null && echo set; grep Seccomp: /proc/self/status";
    let text = t
        .output(script, |config| {
            security(config).seccomp = seccomp;
            capability(config, &["SYS_ADMIN"], &[]);
        })
        .await?;
    same("the process", text.as_str(), "Seccomp:\t2\n")
}

async fn with_profile(t: &T, file: &std::path::Path) -> Result<tonic::Status> {
    let pod = t.sandbox().await?;
    let mut config = t.shell("true");
    security(&mut config).seccomp = profile(ProfileType::Localhost, &file.display().to_string());
    let result = match t.try_create(&pod, &config).await {
        Ok(id) => t.try_start(&id).await,
        Err(status) => Err(status),
    };
    refused("the profile", result)
}

async fn seccomp_missing(t: T) -> Result<()> {
    holds(
        "the error",
        with_profile(&t, &t.dir.join("nobody-has-this.json")).await?.message(),
        "nobody-has-this",
    )
}

async fn seccomp_broken(t: T) -> Result<()> {
    let file = t.dir.join("broken.json");
    std::fs::write(&file, "{ this is no JSON")?;
    with_profile(&t, &file).await.map(drop)
}

async fn seccomp_privileged(t: T) -> Result<()> {
    let pod = privileged_pod(&t).await?;
    let text = t
        .output_in(&pod, "grep Seccomp: /proc/self/status", |config| {
            make_privileged(config);
            security(config).seccomp = profile(ProfileType::RuntimeDefault, "");
        })
        .await?;
    same("the mode", text.as_str(), "Seccomp:\t0\n")
}
