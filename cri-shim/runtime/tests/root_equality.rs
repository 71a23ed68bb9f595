//! The same specification run by runc and by this runtime: the first process and an additional one find themselves
//! confined alike, by what the kernel tells about them.

mod support;

use std::collections::BTreeMap;
use std::process::{Command, Stdio as Std};

use cri_shim_runtime::Stdio;
use serde_json::{Value, json};

use support::{Bundle, CAPABILITIES, Running, exec, plain, start, unique, wait_until};

/// Prints everything that is compared.
const LOOK: &str = "for f in status limits cgroup mountinfo oom_score_adj; do echo == $f; cat /proc/self/$f; done; \
    echo == attr; cat /proc/self/attr/current 2>/dev/null; echo == fds; echo /proc/self/fd/*; \
    echo == env; env | sort; echo == cwd; pwd; umask; echo == ns; readlink /proc/self/ns/* | sed 's/:.*//'; \
    echo == dev; ls -ln /dev | sed 's/  */ /g' | cut -d' ' -f1,3,4,5,6,9-";

/// A container of runc that is removed when dropped.
struct Runc<'a> {
    id: String,
    bundle: &'a Bundle,
}

impl<'a> Runc<'a> {
    fn start(bundle: &'a Bundle, value: &Value) -> Self {
        std::fs::write(bundle.dir().join("config.json"), value.to_string()).expect("written");
        let runc = Self { id: unique(), bundle };
        let log = bundle.dir().join("runc.log");
        let status = runc
            .command(&["--log", &log.display().to_string(), "run", "--detach", "--bundle"])
            .arg(bundle.dir())
            .arg(&runc.id)
            .stdin(Std::null())
            .stdout(Std::null())
            .stderr(Std::null())
            .status();
        let log = std::fs::read_to_string(log).unwrap_or_default();
        assert!(status.expect("runs").success(), "{log}");
        runc
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(self.bundle.dir().join("runc")).args(args);
        command
    }

    fn exec(&self, process: &Value) -> String {
        let file = self.bundle.dir().join("process.json");
        std::fs::write(&file, process.to_string()).expect("written");
        let output =
            self.command(&["exec", "--process"]).arg(&file).arg(&self.id).stdin(Std::null()).output();
        let output = output.expect("runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Runc<'_> {
    fn drop(&mut self) {
        drop(self.command(&["delete", "--force"]).arg(&self.id).output());
    }
}

/// Parts by their names, without what differs from run to run.
fn parts(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut parts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines() {
        match line.strip_prefix("== ") {
            Some(next) => next.clone_into(&mut name),
            None => parts.entry(name.clone()).or_default().extend(normal(&name, line)),
        }
    }
    parts
}

/// A line as it is compared.
fn normal(part: &str, line: &str) -> Option<String> {
    match part {
        "status" => {
            let name = line.split(':').next().unwrap_or_default();
            let kept = [
                "Uid",
                "Gid",
                "Groups",
                "CapInh",
                "CapPrm",
                "CapEff",
                "CapBnd",
                "CapAmb",
                "NoNewPrivs",
                "Seccomp",
                "Seccomp_filters",
                "Speculation_Store_Bypass",
                "Cpus_allowed",
                "Mems_allowed",
                "Umask",
                "SigBlk",
                "SigIgn",
                "SigCgt",
                "NSpid",
            ];
            let line = if name == "NSpid" {
                format!("NSpid: {} namespaces", line.split_whitespace().count() - 1)
            } else {
                line.to_owned()
            };
            kept.contains(&name).then_some(line)
        }
        "mountinfo" => Some(mount(line)),
        "cgroup" => Some(line.replace(unique_part(line), "ID")),
        // runc leaves its own group, which has no number in a user namespace, on what it makes.
        "dev" => Some(line.replace(" 0 65534 ", " 0 0 ")),
        _ => Some(line.to_owned()),
    }
}

fn unique_part(line: &str) -> &str {
    line.split('/').find(|part| part.starts_with("keelson-rt-")).unwrap_or("\0")
}

/// Place, options, propagation kind, type, source and super options; ids and devices differ.
fn mount(line: &str) -> String {
    let fields: Vec<&str> = line.split(' ').collect();
    let dash = fields.iter().position(|field| *field == "-").expect("a separator");
    let tags: Vec<String> =
        fields[6..dash].iter().map(|tag| tag.split(':').next().unwrap_or_default().to_owned()).collect();
    let root = fields[3].replace(unique_part(fields[3]), "ID");
    // Masks of files show which null device lies there: the container's or the host's.
    let (root, source) = if fields[4] != "/dev" && (root == "/null") {
        ("NULL".to_owned(), "NULL".to_owned())
    } else {
        (root, fields[dash + 1..].join(" "))
    };
    format!("{root} {} {} {tags:?} {source}", fields[4], fields[5])
}

#[track_caller]
fn same(what: &str, ours: &str, theirs: &str) {
    let (mut ours, mut theirs) = (parts(ours), parts(theirs));
    for parts in [&mut ours, &mut theirs] {
        // The order among mounts of one place counts; that of places does not.
        if let Some(mounts) = parts.get_mut("mountinfo") {
            for line in mounts.iter_mut() {
                if line.contains("NULL") {
                    *line = line.split(' ').take(2).collect::<Vec<_>>().join(" ");
                }
            }
            mounts.sort();
        }
    }
    for (name, part) in &theirs {
        let own = ours.get(name).cloned().unwrap_or_default();
        let missing: Vec<_> = part.iter().filter(|line| !own.contains(line)).collect();
        let added: Vec<_> = own.iter().filter(|line| !part.contains(line)).collect();
        assert!(
            missing.is_empty() && added.is_empty(),
            "{what}, {name}:\nonly under runc: {missing:#?}\nonly here: {added:#?}"
        );
        assert_eq!(own.len(), part.len(), "{what}, {name}");
    }
}

/// Runs both with the first process looking around, then an additional process in each.
fn check(change: impl Fn(&mut Value)) {
    check_in(|_| {}, change);
}

/// The same with a prepared root file system.
fn check_in(prepare: impl Fn(&Bundle), change: impl Fn(&mut Value)) {
    let look = format!("{{ {LOOK}; }} > /out/look 2>&1; mv /out/look /out/done; exec sleep 1000");
    let value_of = |bundle: &Bundle| {
        std::fs::create_dir_all(bundle.dir().join("out")).expect("made");
        std::os::unix::fs::chown(bundle.dir().join("out"), Some(1000), None).expect("owned");
        let rights = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(bundle.dir().join("out"), rights).expect("writable");
        let mut value = plain(&["sh", "-c", &look], &unique());
        value["mounts"].as_array_mut().expect("a list").push(json!({
            "destination": "/out", "type": "bind", "source": bundle.dir().join("out"), "options": ["rbind", "rprivate"],
        }));
        prepare(bundle);
        change(&mut value);
        value
    };
    let result = |bundle: &Bundle| {
        let done = bundle.dir().join("out/done");
        wait_until("the first process's look", || done.exists());
        std::fs::read_to_string(done).expect("text")
    };
    let process_of = |value: &Value| {
        let mut process = value["process"].clone();
        process["args"] = json!(["sh", "-c", LOOK]);
        process
    };
    let theirs_bundle = Bundle::new();
    let theirs_value = value_of(&theirs_bundle);
    let theirs = Runc::start(&theirs_bundle, &theirs_value);
    let theirs_first = result(&theirs_bundle);
    let theirs_exec = theirs.exec(&process_of(&theirs_value));

    let ours_bundle = Bundle::new();
    let ours_value = value_of(&ours_bundle);
    let ours: Running = start(&ours_bundle, &ours_value, Stdio::null());
    let ours_first = result(&ours_bundle);
    let (ours_exec, exit) = exec(&ours.container, &process_of(&ours_value));
    assert_eq!(exit.status, 0, "{ours_exec}");

    let bundles = |text: &str, bundle: &Bundle| text.replace(&bundle.dir().display().to_string(), "BUNDLE");
    same("first process", &bundles(&ours_first, &ours_bundle), &bundles(&theirs_first, &theirs_bundle));
    same("exec", &bundles(&ours_exec, &ours_bundle), &bundles(&theirs_exec, &theirs_bundle));
}

#[test]
fn a_plain_container() {
    check(|_| {});
}

#[test]
fn a_user_with_groups_and_no_new_privileges() {
    check(|value| {
        value["process"]["user"] = json!({"uid": 1000, "gid": 1000, "additionalGids": [4, 20]});
        value["process"]["noNewPrivileges"] = json!(true);
        value["process"]["capabilities"] = json!({"bounding": CAPABILITIES});
        value["process"]["cwd"] = json!("/tmp");
        value["process"]["oomScoreAdj"] = json!(500);
    });
}

#[test]
fn ambient_capabilities() {
    check(|value| {
        let caps = json!(["CAP_NET_BIND_SERVICE", "CAP_CHOWN"]);
        value["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        value["process"]["capabilities"] = json!({"bounding": caps, "effective": caps, "permitted": caps, "inheritable": caps, "ambient": caps});
    });
}

#[test]
fn a_read_only_root_with_limits() {
    check(|value| {
        value["root"]["readonly"] = json!(true);
        value["linux"]["resources"] = json!({
            "devices": [{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"}],
            "cpu": {"shares": 512, "quota": 150_000, "period": 100_000},
            "memory": {"limit": 67_108_864, "swap": 67_108_864},
            "pids": {"limit": 100},
        });
        value["linux"]["devices"] = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 1, "gid": 2}]);
    });
}

#[test]
fn a_privileged_container() {
    check(|value| {
        let status = std::fs::read_to_string("/proc/self/status").expect("text");
        let bits = status.lines().find_map(|line| line.strip_prefix("CapPrm:\t")).expect("capabilities");
        let bits = u64::from_str_radix(bits, 16).expect("a number");
        let all: Vec<String> =
            ["CHOWN", "DAC_OVERRIDE", "SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "SYS_MODULE", "MKNOD"]
                .iter()
                .map(|name| format!("CAP_{name}"))
                .collect();
        assert_ne!(bits, 0);
        value["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
        value["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        value["linux"]["maskedPaths"] = json!([]);
        value["linux"]["readonlyPaths"] = json!([]);
        value["mounts"][5]["options"] = json!(["nosuid", "noexec", "nodev"]);
        value["mounts"][6]["options"] = json!(["nosuid", "noexec", "nodev", "relatime"]);
    });
}

#[test]
fn a_cgroup_namespace_and_volumes() {
    check(|value| {
        value["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "cgroup"}));
        let mounts = value["mounts"].as_array_mut().expect("a list");
        for (at, options) in [
            json!(["rbind", "ro", "rslave"]),
            json!(["bind", "nosuid", "nodev", "noexec"]),
            json!(["rbind", "rro"]),
            json!(["rbind", "rshared"]),
        ]
        .into_iter()
        .enumerate()
        {
            mounts.push(json!({"destination": format!("/deep/er/{at}"), "type": "bind", "source": "/etc", "options": options}));
        }
        mounts.push(json!({"destination": "/etc/hosts", "type": "bind", "source": "/etc/hostname", "options": ["bind"]}));
        mounts.push(json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m", "mode=1777", "ro"]}));
    });
}

#[test]
fn system_call_filters() {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["ptrace", "kexec_load", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
        ],
    });
    let mut allowed = profile;
    allowed["defaultAction"] = json!("SCMP_ACT_ALLOW");
    for no_new_privileges in [false, true] {
        check(|value| {
            value["linux"]["seccomp"] = allowed.clone();
            value["process"]["noNewPrivileges"] = json!(no_new_privileges);
        });
    }
}

#[test]
fn a_user_namespace() {
    let owned = |bundle: &Bundle| {
        // runc looks the root file system up as the container's root.
        let rights = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(bundle.dir(), rights).expect("changed");
        let rootfs = bundle.rootfs();
        let status = Command::new("chown").args(["-hR", "100000:100000"]).arg(rootfs).status();
        assert!(status.expect("runs").success());
    };
    check_in(owned, |value| {
        let namespaces = value["linux"]["namespaces"].as_array_mut().expect("a list");
        namespaces.push(json!({"type": "user"}));
        // As CRI servers ask for it. Without one runc shows the whole of version 2's tree, and we the container's part.
        if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            namespaces.push(json!({"type": "cgroup"}));
        }
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        value["linux"]["uidMappings"] = map.clone();
        value["linux"]["gidMappings"] = map;
        value["linux"]["resources"] = json!({});
    });
}
