//! The chain against plugins that are small shell scripts, which record how they were called.

use std::{fs, os::unix::fs::PermissionsExt};

use super::*;

struct Bench {
    dir: tempfile::TempDir,
    invoker: Invoker,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        let invoker = Invoker {
            bin_dirs: vec![dir.path().join("bin")],
            cache_dir: dir.path().join("cache"),
            deadline: Duration::from_secs(5),
        };
        Self { dir, invoker }
    }

    /// A plugin that appends `<name> <command> <prevResult present>` to the log, then runs `body`.
    fn plugin(&self, name: &str, body: &str) {
        let log = self.dir.path().join("log");
        let path = self.dir.path().join("bin").join(name);
        let text = format!(
            "#!/bin/sh\nIN=$(cat)\ncase \"$IN\" in *prevResult*) P=prev;; *) P=none;; esac\n\
             echo {name} $CNI_COMMAND $P >> {}\n{body}\n",
            log.display()
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn log(&self) -> Vec<String> {
        fs::read_to_string(self.dir.path().join("log"))
            .unwrap_or_default()
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

const GOOD: &str =
    r#"[ $CNI_COMMAND = ADD ] && echo '{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.2/24"}]}'; exit 0"#;

fn two_plugins() -> NetworkConfigList {
    NetworkConfigList::parse(r#"{"cniVersion":"1.1.0","name":"net","plugins":[{"type":"a"},{"type":"b"}]}"#)
        .unwrap()
}

fn args() -> RuntimeArgs {
    RuntimeArgs { container_id: "c1".to_owned(), ifname: "eth0".to_owned(), ..RuntimeArgs::default() }
}

#[tokio::test]
async fn add_chains_forward_and_del_backward_with_the_cached_result() {
    let bench = Bench::new();
    bench.plugin("a", GOOD);
    bench.plugin("b", GOOD);
    let result = bench.invoker.add(&two_plugins(), &args()).await.unwrap();
    assert_eq!(result.ips[0].address.to_string(), "10.0.0.2/24");
    assert!(bench.dir.path().join("cache/results/net-c1-eth0").exists());
    bench.invoker.del(&two_plugins(), &args()).await.unwrap();
    bench.invoker.del(&two_plugins(), &args()).await.unwrap();
    assert_eq!(
        bench.log(),
        ["a ADD none", "b ADD prev", "b DEL prev", "a DEL prev", "b DEL none", "a DEL none"]
    );
    assert!(bench.invoker.cached(&two_plugins(), &args()).unwrap().is_none());
}

#[tokio::test]
async fn a_failed_add_is_rolled_back_and_told_with_code_and_stderr() {
    let bench = Bench::new();
    bench.plugin("a", GOOD);
    bench.plugin(
        "b",
        r#"[ $CNI_COMMAND = DEL ] && exit 0; echo oops >&2; echo '{"code":11,"msg":"busy"}'; exit 1"#,
    );
    let error = bench.invoker.add(&two_plugins(), &args()).await.unwrap_err();
    let InvokeError::Plugin { plugin, source, .. } = &error else { panic!("{error}") };
    assert_eq!(plugin, "b");
    assert_eq!(source.to_string(), "busy (CNI error code 11); stderr: oops");
    assert_eq!(bench.log(), ["a ADD none", "b ADD prev", "b DEL none", "a DEL none"]);
}

#[tokio::test]
async fn a_plugin_that_hangs_is_killed_with_its_children() {
    let mut bench = Bench::new();
    bench.invoker.deadline = Duration::from_millis(200);
    let pid_file = bench.dir.path().join("pid");
    bench.plugin("a", &format!("sleep 1000 & echo $! > {}; wait", pid_file.display()));
    let list = NetworkConfigList::parse(r#"{"cniVersion":"1.1.0","name":"net","type":"a"}"#).unwrap();
    let error = bench.invoker.status(&list).await.unwrap_err();
    assert!(matches!(error, InvokeError::Plugin { source: PluginError::Deadline { .. }, .. }), "{error}");
    let pid = fs::read_to_string(pid_file).unwrap();
    let stat = format!("/proc/{}/stat", pid.trim());
    let end = std::time::Instant::now() + Duration::from_secs(5);
    // Dead, or a zombie until its new parent reaps it.
    while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(std::time::Instant::now() < end, "child {pid} is still there");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn gc_deletes_stale_attachments_then_asks_the_plugins() {
    let bench = Bench::new();
    bench.plugin("a", GOOD);
    bench.plugin("b", GOOD);
    let kept = RuntimeArgs { container_id: "c2".to_owned(), ..args() };
    bench.invoker.add(&two_plugins(), &args()).await.unwrap();
    bench.invoker.add(&two_plugins(), &kept).await.unwrap();
    bench.invoker.gc(&two_plugins(), &[("c2".to_owned(), "eth0".to_owned())]).await.unwrap();
    assert!(bench.invoker.cached(&two_plugins(), &args()).unwrap().is_none());
    assert!(bench.invoker.cached(&two_plugins(), &kept).unwrap().is_some());
    assert_eq!(bench.log()[4..], ["b DEL prev", "a DEL prev", "a GC none", "b GC none"]);
}

#[tokio::test]
async fn a_missing_plugin_and_bad_arguments_are_named() {
    let bench = Bench::new();
    let error = bench.invoker.status(&two_plugins()).await.unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.starts_with("failed to find plugin \"a\" in path ["), "{source}");
    // Not even the first one runs while the second is missing.
    bench.plugin("a", GOOD);
    let error = bench.invoker.add(&two_plugins(), &args()).await.unwrap_err();
    assert!(error.ran_nothing(), "{error}");
    assert_eq!(bench.log(), Vec::<String>::new());
    bench.plugin("b", "exit 1");
    assert!(!bench.invoker.add(&two_plugins(), &args()).await.unwrap_err().ran_nothing());
    let bad = RuntimeArgs { container_id: "../x".to_owned(), ..args() };
    let error = bench.invoker.add(&two_plugins(), &bad).await.unwrap_err();
    assert_eq!(error.to_string(), "invalid container id \"../x\"");
}
