//! Registration sockets that come, go and are replaced, with plugins of ours behind them.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tonic::body::Body;

use super::registration::{
    GET_INFO, InfoRequest, NOTIFY, PluginInfo, RegistrationStatus, RegistrationStatusResponse, SERVICE,
};
use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

/// Takes notes; refuses what is named `bad`.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    fn add(&self, note: String) {
        self.0.lock().unwrap().push(note);
    }

    async fn wait_for(&self, note: &str) {
        let begin = Instant::now();
        while !self.0.lock().unwrap().iter().any(|known| known == note) {
            assert!(begin.elapsed() < DEADLINE, "no {note:?} in {:?}", self.0.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl PluginHandler for Notes {
    fn kind(&self) -> &'static str {
        "TestPlugin"
    }

    fn register<'a>(&'a self, plugin: &'a Plugin) -> BoxFuture<'a, Result<(), String>> {
        self.add(format!("register {} at {}", plugin.name, plugin.endpoint.display()));
        let refused = if plugin.name == "bad" { Err("it is bad".to_owned()) } else { Ok(()) };
        async { refused }.boxed()
    }

    fn deregister<'a>(&'a self, plugin: &'a Plugin) -> BoxFuture<'a, ()> {
        self.add(format!("deregister {}", plugin.name));
        async {}.boxed()
    }
}

/// A plugin's registration socket.
#[derive(Clone)]
struct Registrar {
    info: PluginInfo,
    notes: Notes,
}

impl socket::Methods for Registrar {
    const NAME: &'static str = SERVICE;

    async fn call(self, request: http::Request<Body>) -> http::Response<Body> {
        let Self { info, notes } = self;
        match request.uri().path() {
            GET_INFO => socket::answer(request, move |_: InfoRequest| async move { Ok(info) }).await,
            NOTIFY => {
                let told = move |status: RegistrationStatus| async move {
                    notes.add(format!("told {}: {} {}", info.name, status.registered, status.error));
                    Ok(RegistrationStatusResponse {})
                };
                socket::answer(request, told).await
            }
            _ => socket::unimplemented(),
        }
    }
}

fn plugin(path: PathBuf, kind: &str, name: &str, notes: &Notes) -> CancellationToken {
    let info = PluginInfo {
        kind: kind.to_owned(),
        name: name.to_owned(),
        endpoint: format!("/{name}.sock"),
        versions: vec!["1".to_owned()],
    };
    let (registrar, cancel) = (Registrar { info, notes: notes.clone() }, CancellationToken::new());
    let stop = cancel.clone();
    tokio::spawn(async move { socket::serve(&path, registrar, stop).await.unwrap() });
    cancel
}

#[tokio::test]
async fn plugins_are_found_told_and_missed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join("registry").join(name);
    let notes = Notes::default();
    let handlers: Handlers = Arc::new(vec![Arc::new(notes.clone())]);
    // One is there before the agent, one comes later in a directory of its own, two are refused.
    plugin(at("early.sock"), "TestPlugin", "early", &notes);
    let cancel = CancellationToken::new();
    let running = tokio::spawn(run(at(""), handlers, cancel.clone()));
    notes.wait_for("told early: true ").await;
    std::fs::create_dir_all(at("below")).unwrap();
    plugin(at("below/late.sock"), "TestPlugin", "late", &notes);
    notes.wait_for("register late at /late.sock").await;
    notes.wait_for("told late: true ").await;
    plugin(at("bad.sock"), "TestPlugin", "bad", &notes);
    notes.wait_for("told bad: false it is bad").await;
    plugin(at("other.sock"), "OtherPlugin", "other", &notes);
    let no_handler = format!(
        "told other: false no handler registered for plugin type: OtherPlugin at socket {}",
        at("other.sock").display()
    );
    notes.wait_for(&no_handler).await;
    // A hidden socket and one that nobody listens at are nobody's.
    drop(std::os::unix::net::UnixListener::bind(at("dead.sock")).unwrap());
    std::fs::remove_file(at("below/late.sock")).unwrap();
    notes.wait_for("deregister late").await;
    // Another socket of the same name is another plugin, and the one before is not missed.
    plugin(at("early.sock"), "TestPlugin", "again", &notes);
    notes.wait_for("told again: true ").await;
    std::fs::remove_file(at("early.sock")).unwrap();
    notes.wait_for("deregister again").await;
    assert!(!notes.0.lock().unwrap().iter().any(|note| note == "deregister early"));
    cancel.cancel();
    running.await.unwrap();
}
