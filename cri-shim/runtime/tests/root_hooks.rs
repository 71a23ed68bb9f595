//! OCI hooks: each runs at its point, in its namespaces, with the state as it is then; one that fails stops what it should.
//! Needs root.

mod support;

use std::path::Path;

use cri_shim_runtime::wait::reap;
use cri_shim_runtime::{Created, Stdio};
use serde_json::{Value, json};
use support::{Bundle, PATIENCE, create, plain, unique};

/// A hook that notes, in a file of the host, its name, the state that it read, and what it sees.
fn noting(file: &Path, name: &str, sees: &str) -> Value {
    let script = format!("{{ printf '%s ' {name}; cat; printf ' '; {sees}; }} >> {}", file.display());
    json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin", "WHO=hook"] })
}

/// Name, state and what was seen, for each hook that has run.
fn notes(file: &Path) -> Vec<(String, Value, String)> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = |line: &str| {
        let (name, rest) = line.split_once(' ').expect("a name");
        let end = rest.rfind('}').expect("a state") + 1;
        let state = serde_json::from_str(&rest[..end]).expect("JSON");
        (name.to_owned(), state, rest[end..].trim().to_owned())
    };
    text.lines().map(line).collect()
}

fn named(bundle: &Bundle, hooks: Value) -> Value {
    let mut value = plain(&["sh", "-c", "echo program >> /seen; exec sleep 3600"], &unique());
    value["hooks"] = hooks;
    value["annotations"] = json!({ "team": "a" });
    std::fs::create_dir_all(bundle.rootfs().join("notes")).expect("made");
    value
}

#[test]
fn each_runs_at_its_point_where_it_belongs() {
    let bundle = Bundle::new();
    let file = bundle.dir().join("notes");
    // The container's own mounts are seen below the path of the root file system before it becomes the root.
    let mounted = format!(
        "(test -c {0}/dev/null && hostname && pwd) 2>&1 | tr '\\n' ' '; echo $WHO",
        bundle.rootfs().display()
    );
    let inside = json!({
        "path": "/bin/sh",
        "args": ["sh", "-c", "cat > /state; id -u > /who; hostname >> /who; echo before >> /seen"],
    });
    let value = named(
        &bundle,
        json!({
            "prestart": [noting(&file, "prestart", "hostname")],
            "createRuntime": [noting(&file, "createRuntime", "hostname")],
            "createContainer": [noting(&file, "createContainer", &mounted)],
            "startContainer": [inside],
            "poststart": [noting(&file, "poststart", "echo")],
            "poststop": [noting(&file, "poststop", "echo"), { "path": "/bin/false" }],
        }),
    );
    let Created { container, pending, pidfd, .. } =
        create(&bundle, &value, Stdio::null()).unwrap_or_else(|error| panic!("{}", error.chain()));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("read").trim().to_owned();
    let root = bundle.rootfs().display().to_string();
    let all = notes(&file);
    let names: Vec<&str> = all.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(names, ["prestart", "createRuntime", "createContainer"]);
    for (name, state, _) in &all {
        assert_eq!(state["status"], "creating", "{name}");
        assert_eq!(state["pid"], container.pid, "{name}");
        assert_eq!(state["id"], container.id, "{name}");
        assert_eq!(state["bundle"], bundle.dir().display().to_string(), "{name}");
        assert_eq!(state["annotations"], json!({ "team": "a" }), "{name}");
    }
    assert_eq!((all[0].2.as_str(), all[1].2.as_str()), (host.as_str(), host.as_str()));
    assert_eq!(all[2].2, format!("box {root} hook"), "in the container's namespaces, with its mounts");
    assert!(!bundle.rootfs().join("state").exists(), "it has not been started");

    // As another process takes it up.
    let container: cri_shim_runtime::Container =
        serde_json::from_str(&serde_json::to_string(&container).expect("JSON")).expect("JSON");
    pending.start().unwrap_or_else(|error| panic!("{}", error.chain()));
    let state = std::fs::read_to_string(bundle.rootfs().join("state")).expect("written inside");
    let state: Value = serde_json::from_str(&state).expect("JSON");
    assert_eq!((&state["status"], &state["pid"]), (&json!("created"), &json!(container.pid)));
    assert_eq!(std::fs::read_to_string(bundle.rootfs().join("who")).expect("read"), "0\nbox\n");
    let last = notes(&file).pop().expect("noted");
    assert_eq!((last.0.as_str(), &last.1["status"]), ("poststart", &json!("running")));

    container.kill_all(9).expect("killed");
    reap(&pidfd, true).expect("reaped");
    container.delete(PATIENCE).expect("deleted");
    assert_eq!(notes(&file).len(), 4);
    let problems = container.run_poststop(PATIENCE);
    assert_eq!(problems, ["hooks.poststop[1]: /bin/false: ended with status 1"]);
    let last = notes(&file).pop().expect("noted");
    assert_eq!((last.0.as_str(), &last.1["status"]), ("poststop", &json!("stopped")));
    let seen = std::fs::read_to_string(bundle.rootfs().join("seen")).expect("read");
    assert!(seen.starts_with("before\n"), "{seen}");
}

#[test]
fn one_that_fails_stops_the_creation_and_tells_why() {
    let failing = |script: &str| json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
    let cases = [
        (
            json!({ "createRuntime": failing("echo no license >&2; exit 4") }),
            "hooks.createRuntime[0]: /bin/sh: ended with status 4: no license",
        ),
        (
            json!({ "prestart": [{ "path": "/no/such/hook" }] }),
            "hooks.prestart[0]: /no/such/hook: No such file or directory",
        ),
        (
            json!({ "createContainer": failing("echo no card; exit 5") }),
            "hooks.createContainer[0]: /bin/sh: ended with status 5: no card",
        ),
        (
            json!({ "createContainer": [{ "path": "/bin/true" }, { "path": "/no/such/hook" }] }),
            "hooks.createContainer[1]: /no/such/hook: No such file or directory",
        ),
        (
            json!({ "createContainer": [{ "path": "/bin/sleep", "args": ["sleep", "3600"], "timeout": 1 }] }),
            "hooks.createContainer[0]: /bin/sleep: has not ended in time",
        ),
    ];
    for (mut hooks, wanted) in cases {
        let bundle = Bundle::new();
        let file = bundle.dir().join("notes");
        hooks["poststop"] = json!([noting(&file, "poststop", "echo")]);
        let value = named(&bundle, hooks);
        let error = create(&bundle, &value, Stdio::null()).expect_err("a hook fails").chain();
        assert!(error.starts_with(wanted), "{error:?} is not {wanted:?}");
        assert_eq!(notes(&file).len(), 1, "what had begun is ended");
        let path = value["linux"]["cgroupsPath"].as_str().expect("a path");
        assert!(!Path::new("/sys/fs/cgroup/unified").join(path.trim_start_matches('/')).exists());
    }
}

#[test]
fn one_that_fails_at_the_start_keeps_the_program_from_running() {
    let bundle = Bundle::new();
    let value = named(
        &bundle,
        json!({
            "startContainer": [{ "path": "/bin/true" }, { "path": "/bin/sh", "args": ["sh", "-c", "exit 6"] }],
        }),
    );
    let Created { container, pending, pidfd, .. } = create(&bundle, &value, Stdio::null()).expect("created");
    let error = pending.start().expect_err("a hook fails").chain();
    assert_eq!(error, "hooks.startContainer[1]: /bin/sh: ended with status 6");
    reap(&pidfd, true).expect("reaped");
    container.delete(PATIENCE).expect("deleted");
    assert!(!bundle.rootfs().join("seen").exists(), "the program has run");

    // After its beginning, the caller ends it.
    let value = named(&bundle, json!({ "poststart": [{ "path": "/bin/false" }] }));
    let Created { container, pending, pidfd, .. } = create(&bundle, &value, Stdio::null()).expect("created");
    let error = pending.start().expect_err("a hook fails").chain();
    assert_eq!(error, "hooks.poststart[0]: /bin/false: ended with status 1");
    container.kill_all(9).expect("killed");
    reap(&pidfd, true).expect("reaped");
    container.delete(PATIENCE).expect("deleted");
}

#[test]
fn those_of_a_pod_with_its_own_users_see_them() {
    let bundle = Bundle::new();
    let file = bundle.dir().join("notes");
    // The pod's own root is nobody here, and must get through to the root file system and the notes.
    let open = std::os::unix::fs::PermissionsExt::from_mode;
    std::fs::set_permissions(bundle.dir(), open(0o777)).expect("opened");
    let map = json!([{ "containerID": 0, "hostID": 200_000, "size": 65536 }]);
    let mut value = named(
        &bundle,
        json!({
            "createRuntime": [noting(&bundle.dir().join("outside"), "createRuntime", "echo")],
            "createContainer": [noting(&file, "createContainer", "head -n 1 /proc/self/uid_map | tr -s ' '")],
        }),
    );
    value["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({ "type": "user" }));
    value["linux"]["uidMappings"] = map.clone();
    value["linux"]["gidMappings"] = map;
    for part in ["", "proc", "sys", "dev", "bin"] {
        std::os::unix::fs::chown(bundle.rootfs().join(part), Some(200_000), Some(200_000)).expect("owned");
    }
    let Created { container, pending, pidfd, .. } =
        create(&bundle, &value, Stdio::null()).unwrap_or_else(|error| panic!("{}", error.chain()));
    pending.start().unwrap_or_else(|error| panic!("{}", error.chain()));
    let (outside, inside) = (notes(&bundle.dir().join("outside")), notes(&file));
    assert_eq!(outside[0].1["pid"], container.pid, "of the container's process, not of who made it");
    assert_eq!((&inside[0].1["pid"], inside[0].2.as_str()), (&json!(container.pid), "0 200000 65536"));
    container.kill_all(9).expect("killed");
    reap(&pidfd, true).expect("reaped");
    container.delete(PATIENCE).expect("deleted");
}
