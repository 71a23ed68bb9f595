//! Users, groups, capabilities and confinement of containers as only the kernel can prove them, with every handler that is
//! offered. Needs root.

mod support;

use cri_shim_api::v1;
use cri_shim_api::v1::security_profile::ProfileType;
use support::cri::{Cri, shell};
use support::pods::{end, number, profile, sandboxes, secured};

type Change = Box<dyn Fn(&mut v1::LinuxContainerSecurityContext)>;

#[tokio::test(flavor = "multi_thread")]
async fn users_and_groups_are_the_ones_told() {
    let cri = Cri::start().await;
    let all = sandboxes(&cri, "users", |_| ()).await;
    for (pod, sandbox) in &all {
        let who = "id -u; id -g; id -G";
        let cases: [(&str, Change, &str); 6] = [
            ("plain", Box::new(|_| ()), "0\n0\n0"),
            ("named", Box::new(|security| security.run_as_username = "web".into()), "33\n33\n33 77"),
            (
                "merge",
                Box::new(|security| {
                    security.run_as_user = Some(number(33));
                    security.run_as_group = Some(number(50));
                    security.supplemental_groups = vec![60, 50];
                }),
                "33\n50\n50 60 77",
            ),
            (
                "strict",
                Box::new(|security| {
                    security.run_as_user = Some(number(33));
                    security.supplemental_groups = vec![60];
                    security.set_supplemental_groups_policy(v1::SupplementalGroupsPolicy::Strict);
                }),
                "33\n33\n33 60",
            ),
            ("unknown", Box::new(|security| security.run_as_user = Some(number(4711))), "4711\n0\n0"),
            ("number", Box::new(|security| security.run_as_username = "33".into()), "33\n33\n33 77"),
        ];
        for (name, change, expected) in cases {
            let (seen, status) = cri.output(sandbox, pod, secured(name, who, change)).await;
            assert_eq!(seen, expected, "{name}");
            let user = status.user.unwrap().linux.unwrap();
            let groups: Vec<String> = user.supplemental_groups.iter().map(ToString::to_string).collect();
            assert_eq!(
                format!("{}\n{}\n{}", user.uid, user.gid, groups.join(" ")),
                expected,
                "status of {name}"
            );
        }
    }
    end(&cri, all).await;
}

/// The sets of capabilities as the kernel shows them, by name.
fn capabilities(status: &str, set: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(set)).expect("a set");
    u64::from_str_radix(line.trim_start_matches(':').trim(), 16).expect("a number")
}

#[tokio::test(flavor = "multi_thread")]
async fn confinement_is_what_the_security_context_says() {
    const CHOWN: u64 = 1;
    const NET_ADMIN: u64 = 1 << 12;
    const DEFAULT: u64 = 0xa804_25fb;
    let cri = Cri::start().await;
    let filter = cri.dir().join("no-mkdir.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":13}]}"#;
    std::fs::write(&filter, text).unwrap();
    let all = sandboxes(&cri, "confined", |pod| {
        let linux = pod.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
    })
    .await;
    for (pod, sandbox) in &all {
        let show = "cat /proc/self/status";
        let run = |config| async { cri.output(sandbox, pod, config).await.0 };
        let seen = run(shell("default", show)).await;
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(capabilities(&seen, set), DEFAULT, "{set}");
        }
        assert_eq!(capabilities(&seen, "CapAmb"), 0);
        assert!(seen.contains("NoNewPrivs:\t0") && seen.contains("Seccomp:\t2"), "{seen}");

        let config = secured("tight", show, |security| {
            security.no_new_privs = true;
            security.seccomp = Some(profile(ProfileType::Unconfined, ""));
            security.capabilities = Some(v1::Capability {
                drop_capabilities: vec!["ALL".into()],
                add_capabilities: vec!["CAP_CHOWN".into(), "net_admin".into()],
                ..v1::Capability::default()
            });
        });
        let seen = run(config).await;
        assert_eq!(capabilities(&seen, "CapEff"), CHOWN | NET_ADMIN);
        assert_eq!(capabilities(&seen, "CapBnd"), CHOWN | NET_ADMIN);
        assert!(seen.contains("NoNewPrivs:\t1") && seen.contains("Seccomp:\t0"), "{seen}");

        let config = secured("ambient", show, |security| {
            security.run_as_user = Some(v1::Int64Value { value: 1000 });
            security.capabilities = Some(v1::Capability {
                add_ambient_capabilities: vec!["CHOWN".into()],
                ..v1::Capability::default()
            });
        });
        let seen = run(config).await;
        assert_eq!(capabilities(&seen, "CapAmb"), CHOWN);
        assert_eq!(capabilities(&seen, "CapEff"), CHOWN, "what survives the change of user");

        let config = secured("filtered", "mkdir /tmp-x || echo refused", |security| {
            security.seccomp = Some(profile(ProfileType::Localhost, &filter.display().to_string()));
        });
        assert!(run(config).await.contains("refused"));
        let config = secured("old-name", "busybox grep Seccomp: /proc/self/status", |security| {
            security.seccomp = None;
            security.seccomp_profile_path = "runtime/default".into();
        });
        assert_eq!(run(config).await, "Seccomp:\t2");

        let config = secured(
            "paths",
            "cat /proc/stat | busybox wc -c; echo 1 > /proc/sys/vm/swappiness; cat /proc/uptime | busybox wc -c",
            |security| {
                security.masked_paths = vec!["/proc/stat".into(), "/proc/uptime".into(), "/no/such".into()];
            },
        );
        let seen = run(config).await;
        assert!(seen.starts_with("0\n") && seen.ends_with("\n0") && seen.contains("Read-only"), "{seen}");
        let config = secured("frozen", "echo x > /file; echo x > /dev/shm/file && echo memory", |security| {
            security.readonly_rootfs = true;
        });
        let seen = run(config).await;
        assert!(seen.contains("Read-only file system") && seen.contains("memory"), "{seen}");

        let config = secured(
            "privileged",
            "cat /proc/self/status; ls /dev | busybox wc -l; mkdir -p /m && mount -t tmpfs x /m && echo mounted",
            |security| {
                security.privileged = true;
            },
        );
        let seen = run(config).await;
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        assert_eq!(capabilities(&seen, "CapEff"), capabilities(&own, "CapBnd"));
        assert!(seen.contains("Seccomp:\t0") && seen.contains("mounted"), "{seen}");
    }
    end(&cri, all).await;
}
