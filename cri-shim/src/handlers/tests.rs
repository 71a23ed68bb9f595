//! Refusals, the choice of the default, and tries with programs that answer as told.

use std::fs;
use std::process::Command;

use super::*;

const AT_ONCE: (Duration, Duration) = (Duration::ZERO, Duration::ZERO);
const NEVER: (Duration, Duration) = (Duration::from_secs(10_000), Duration::from_secs(10_000));
/// What a program says that has made a container as far as its command, which is not there.
const GOOD: &str = "exec: /no-such-command-of-keelson: no such file";

/// Handlers with outcomes as if they had been tried.
fn handlers(
    wanted: Vec<HandlerConfig>,
    configured: Option<&str>,
    outcome: impl Fn(&str) -> Result<(), &'static str>,
) -> Handlers {
    let ground = Ground { shim_binary: None, scratch: PathBuf::from("/nowhere"), cgroups: Roots::default() };
    let all = Handlers::new(wanted, configured.map(str::to_owned), ground, NEVER);
    for handler in &all.wanted {
        let outcome = outcome(&handler.name).map(|()| ("/bin/x".into(), Features::default()));
        all.settle(handler, outcome.map_err(str::to_owned));
    }
    all.choose_default();
    all
}

fn no_crun(name: &str) -> Result<(), &'static str> {
    if name == "crun" { Err("crun: cgroups in hybrid mode not supported") } else { Ok(()) }
}

#[test]
fn pods_that_name_none_get_the_best_handler_that_works() {
    let only_runc = |name: &str| if name == "runc" { Ok(()) } else { Err("no libseccomp") };
    let chosen = |all: Handlers| all.known().default.clone();
    assert_eq!(chosen(handlers(defaults(), None, no_crun)), "keelson");
    assert_eq!(chosen(handlers(defaults(), None, only_runc)), "runc");
    assert_eq!(chosen(handlers(defaults(), Some("keelson"), only_runc)), "keelson", "as asked, to be told");
    let only = || vec![HandlerConfig { name: "crun".into(), kind: HandlerKind::Runc, binary: None }];
    assert_eq!(chosen(handlers(only(), None, only_runc)), "crun", "nothing else was configured");
    let broken = handlers(defaults(), None, only_runc);
    assert_eq!(broken.kind_of_record("keelson"), Some(HandlerKind::Keelson));
    assert_eq!(broken.kind_of_record(""), Some(HandlerKind::Runc));
    assert_eq!(broken.kind_of_record("gone"), None);
}

#[test]
fn refusals_name_the_cause_and_what_there_is() {
    let all = handlers(defaults(), Some("runc"), no_crun);
    assert_eq!(all.get("").unwrap().name, "runc");
    assert_eq!(all.of_record("").unwrap().name, "runc");
    let words = |name| tonic::Status::from(all.get(name).unwrap_err());
    assert_eq!(words("kata").code(), tonic::Code::InvalidArgument);
    let all_of_them = "there are keelson, runc";
    assert_eq!(
        words("kata").message(),
        format!(r#"runtime handler "kata" is not configured; {all_of_them}"#)
    );
    assert!(words("crun").message().contains(&format!("hybrid mode not supported; {all_of_them}")));
    assert_eq!(all.default_problem(), None);
    assert!(handlers(defaults(), Some("crun"), no_crun).default_problem().unwrap().contains("hybrid"));
}

/// Programs in a directory that stand in for runc: each tells with the words in `<name>.says` how its containers end, as soon
/// as that file is there, and counts its tries in `<name>.tries`.
struct Programs(tempfile::TempDir);

impl Programs {
    fn new(names: &[&str]) -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        for name in names {
            let script = "#!/bin/sh\ncase $1 in --root) ;; *) exit 0;; esac\necho >> $0.tries\n\
                          until [ -e $0.says ]; do sleep 0.02; done\ncat $0.says >&2\nexit 1\n";
            // Written by another process: a thread of this one that forks meanwhile would hold the file open for writing, and
            // what is open so cannot be run.
            let path = this.path(name);
            let write = "printf %s \"$1\" > \"$0\" && chmod +x \"$0\"";
            let written =
                Command::new("/bin/sh").args(["-c", write, path.to_str().unwrap(), script]).status();
            assert!(written.unwrap().success());
        }
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn say(&self, name: &str, words: &str) {
        fs::write(self.path(&format!("{name}.new")), words).unwrap();
        fs::rename(self.path(&format!("{name}.new")), self.path(&format!("{name}.says"))).unwrap();
    }

    fn tries(&self, name: &str) -> usize {
        fs::read_to_string(self.path(&format!("{name}.tries"))).unwrap_or_default().lines().count()
    }

    /// Handlers with these names, not tried yet.
    fn handlers(&self, names: &[&str], default: Option<&str>, pauses: (Duration, Duration)) -> Arc<Handlers> {
        let wanted = names.iter().map(|name| HandlerConfig {
            name: (*name).to_owned(),
            kind: HandlerKind::Runc,
            binary: Some(self.path(name)),
        });
        let scratch = self.path("probes");
        let ground = Ground { shim_binary: None, scratch, cgroups: Roots::default() };
        Arc::new(Handlers::new(wanted.collect(), default.map(str::to_owned), ground, pauses))
    }
}

#[tokio::test]
async fn a_refused_handler_is_tried_again_when_a_pod_names_it() {
    let programs = Programs::new(&["runc", "crun"]);
    programs.say("runc", GOOD);
    programs.say("crun", "too busy");
    let all = programs.handlers(&["runc", "crun"], None, AT_ONCE);
    all.try_all().await;
    let refused = all.obtain("crun").await.unwrap_err().to_string();
    assert!(refused.contains("too busy"), "{refused}");
    assert_eq!(programs.tries("crun"), 2);
    programs.say("crun", GOOD);
    assert_eq!(all.obtain("crun").await.unwrap().name, "crun");
    assert_eq!(all.obtain_of_record("crun").await.unwrap().name, "crun");
    assert_eq!(programs.tries("crun"), 3, "one that works is not tried any more");
    assert_eq!(programs.tries("runc"), 1);
    let names: Vec<String> = all.offered().iter().map(|handler| handler.name.clone()).collect();
    assert_eq!(names, ["runc", "crun"]);
    assert_eq!(all.info()["refused"], json!([]));
    assert!(fs::read_dir(programs.path("probes")).unwrap().next().is_none(), "nothing is left of a try");
}

#[tokio::test]
async fn many_pods_at_once_make_one_try_and_a_pause_follows() {
    let programs = Programs::new(&["crun"]);
    programs.say("crun", "too busy");
    let all = programs.handlers(&["crun"], None, AT_ONCE);
    all.try_all().await;
    fs::remove_file(programs.path("crun.says")).unwrap();
    let mut pods: Vec<_> = (0..50).map(|_| Box::pin(all.obtain("crun"))).collect();
    for pod in &mut pods {
        assert!(futures::poll!(pod).is_pending());
    }
    // Half of them lose patience.
    pods.truncate(25);
    programs.say("crun", GOOD);
    for pod in join_all(pods).await {
        assert_eq!(pod.unwrap().name, "crun");
    }
    assert_eq!(programs.tries("crun"), 2);

    let all = programs.handlers(&["crun"], None, NEVER);
    programs.say("crun", "still too busy");
    all.try_all().await;
    for _ in 0..10 {
        let refused = all.obtain("crun").await.unwrap_err().to_string();
        assert!(refused.contains("still too busy"), "{refused}");
    }
    assert_eq!(programs.tries("crun"), 3, "it was tried a moment ago");
    assert_eq!(all.info()["refused"][0]["triedAgainAfterSeconds"], 10_000);
    let unknown = all.obtain("kata").await.unwrap_err().to_string();
    assert!(unknown.contains("is not configured"), "{unknown}");
}

#[tokio::test]
async fn the_start_need_not_wait_for_a_slow_handler() {
    let programs = Programs::new(&["slow", "quick"]);
    programs.say("quick", GOOD);
    let all = programs.handlers(&["slow", "quick"], None, NEVER);
    let start = all.try_all();
    tokio::pin!(start);
    let begun = Instant::now();
    while all.get("quick").is_err() {
        assert!(futures::poll!(&mut start).is_pending());
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", all.info());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    all.choose_default();
    assert_eq!(all.get("").unwrap().name, "quick", "of those that work");
    let unknown = all.get("slow").unwrap_err().to_string();
    assert!(unknown.contains(UNKNOWN), "{unknown}");
    // A pod that names it waits for the same try.
    let mut pod = Box::pin(all.obtain("slow"));
    assert!(futures::poll!(&mut pod).is_pending());
    programs.say("slow", GOOD);
    assert_eq!(pod.await.unwrap().name, "slow");
    start.await;
    assert_eq!((programs.tries("slow"), programs.tries("quick")), (1, 1));
}

#[tokio::test]
async fn status_tries_the_default_again_and_it_becomes_the_default() {
    let programs = Programs::new(&["keelson", "runc"]);
    programs.say("keelson", "too busy");
    programs.say("runc", GOOD);
    let all = programs.handlers(&["keelson", "runc"], None, AT_ONCE);
    all.try_all().await;
    assert_eq!(all.get("").unwrap().name, "runc");
    programs.say("keelson", GOOD);
    let begun = Instant::now();
    while all.get("").unwrap().name != "keelson" {
        all.look_again();
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", all.info());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Nothing works at first: the node is not ready until something does, also when that is not the best one.
    programs.say("keelson", "too busy");
    programs.say("runc", "too busy");
    let all = programs.handlers(&["keelson", "runc"], None, AT_ONCE);
    all.try_all().await;
    assert!(all.default_problem().unwrap().contains("too busy"));
    programs.say("runc", GOOD);
    assert_eq!(all.obtain("").await.unwrap().name, "runc");
    assert_eq!(all.default_problem(), None);
}

#[test]
fn tries_are_made_less_and_less_often() {
    let all = handlers(defaults(), None, no_crun);
    let crun = all.wanted("crun").unwrap().clone();
    let all = Handlers { pauses: PAUSES, ..all };
    all.known_mut().refused.clear();
    let pauses: Vec<u64> = (0..9)
        .map(|_| {
            all.settle(&crun, Err("hybrid".to_owned()));
            all.known().refused[0].pause.as_secs()
        })
        .collect();
    assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300, 300]);
}
