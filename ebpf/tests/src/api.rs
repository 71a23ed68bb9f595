//! A pretended API server: lists in pages, watches from a revision, takes Events. Plain HTTP on loopback, for an agent
//! that shall see exactly the objects, gaps and failures that a test or bench chooses.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufReader, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

/// How often a waiting watch looks whether its server has ended.
const BREATH: Duration = Duration::from_millis(200);

/// The server; ends when dropped.
pub struct Api {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    revision: u64,
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// Every change: revision, kind, and the line that watches are told.
    log: Vec<(u64, String, String)>,
    events: Vec<Value>,
    /// Answers nothing and lets every connection go.
    down: bool,
    /// Lists nothing, whatever there is.
    empty: bool,
    /// How often each kind was listed from its beginning.
    lists: BTreeMap<String, u64>,
    /// Counts how often all watches were broken off.
    breaks: u64,
    ended: bool,
}

impl Api {
    /// Starts one in the calling thread's network namespace.
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let server = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if server.lock().ended {
                    return;
                }
                let server = Arc::clone(&server);
                // A client that breaks off is its own business.
                std::thread::spawn(move || drop(server.serve(stream)));
            }
        });
        Ok(Self { address, shared })
    }

    /// Makes or replaces an object of a kind (`services`, `endpointslices`, `nodes`).
    pub fn put(&self, plural: &str, object: Value) {
        self.shared.lock().put(plural, object);
        self.shared.changed.notify_all();
    }

    /// Makes or replaces many at once.
    pub fn put_all(&self, plural: &str, objects: impl IntoIterator<Item = Value>) {
        let mut state = self.shared.lock();
        for object in objects {
            state.put(plural, object);
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Deletes an object.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) {
        self.shared.lock().delete(plural, &format!("{namespace}/{name}"));
        self.shared.changed.notify_all();
    }

    /// Lets every connection go and answers nothing, or serves again.
    pub fn set_down(&self, down: bool) {
        self.shared.lock().down = down;
        self.shared.changed.notify_all();
    }

    /// Breaks all watches off, as a server does that has forgotten what they have seen: clients list again.
    pub fn break_watches(&self) {
        self.shared.lock().breaks += 1;
        self.shared.changed.notify_all();
    }

    /// Pretends in lists that there is nothing, or tells the truth again.
    pub fn set_empty(&self, empty: bool) {
        self.shared.lock().empty = empty;
    }

    /// How often a kind was listed from its beginning.
    pub fn lists(&self, plural: &str) -> u64 {
        self.shared.lock().lists.get(plural).copied().unwrap_or_default()
    }

    /// Reason, object and message of every Event that was posted.
    pub fn events(&self) -> Vec<(String, String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let state = self.shared.lock();
        let events = state.events.iter().map(|event| {
            let object = if event["regarding"].is_object() { "regarding" } else { "involvedObject" };
            let message = if event["note"].is_string() { "note" } else { "message" };
            (text(&event["reason"]), text(&event[object]["name"]), text(&event[message]))
        });
        events.collect()
    }

    /// Waits for an Event with this reason on this object whose message holds these words.
    pub fn wait_for_event(&self, reason: &str, object: &str, words: &str) -> Result<()> {
        let until = Instant::now() + crate::servers::DEADLINE * 3;
        loop {
            let events = self.events();
            let wanted =
                |(r, o, m): &(String, String, String)| r == reason && o == object && m.contains(words);
            if events.iter().any(wanted) {
                return Ok(());
            }
            ensure!(Instant::now() < until, "no {reason} on {object} with {words:?} among {events:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A kubeconfig that leads here.
    #[must_use]
    pub fn kubeconfig(&self) -> String {
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "bench",
            "clusters": [{"name": "bench", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "bench", "user": {}}],
            "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        })
        .to_string()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        state.down = true;
        drop(state);
        self.shared.changed.notify_all();
        drop(TcpStream::connect(self.address));
    }
}

impl State {
    fn put(&mut self, plural: &str, mut object: Value) {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        let key = key_of(&object);
        let objects = self.objects.entry(plural.to_owned()).or_default();
        let what = if objects.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        let line = json!({"type": what, "object": object}).to_string();
        objects.insert(key, object);
        self.log.push((self.revision, plural.to_owned(), line));
    }

    fn delete(&mut self, plural: &str, key: &str) {
        if let Some(mut object) = self.objects.get_mut(plural).and_then(|objects| objects.remove(key)) {
            self.revision += 1;
            object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
            let line = json!({"type": "DELETED", "object": object}).to_string();
            self.log.push((self.revision, plural.to_owned(), line));
        }
    }

    /// A page of a list: `limit` objects after the key that `after` names.
    fn page(&mut self, plural: &str, limit: usize, after: &str) -> String {
        if after.is_empty() {
            *self.lists.entry(plural.to_owned()).or_default() += 1;
        }
        let empty = BTreeMap::new();
        let objects = if self.empty { &empty } else { self.objects.get(plural).unwrap_or(&empty) };
        let rest = objects.range::<str, _>((
            if after.is_empty() { std::ops::Bound::Unbounded } else { std::ops::Bound::Excluded(after) },
            std::ops::Bound::Unbounded,
        ));
        let mut items: Vec<(&String, &Value)> = rest.take(limit.saturating_add(1)).collect();
        let more = items.len() > limit;
        items.truncate(limit);
        let token = items.last().filter(|_| more).map(|(key, _)| (*key).clone()).unwrap_or_default();
        let items: Vec<&Value> = items.into_iter().map(|(_, object)| object).collect();
        json!({
            "kind": "List", "apiVersion": "v1",
            "metadata": {"resourceVersion": self.revision.to_string(), "continue": token},
            "items": items,
        })
        .to_string()
    }
}

fn key_of(object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    format!("{}/{}", text("namespace"), text("name"))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers requests of one connection until it ends.
    fn serve(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut writer = stream;
        while let Some(request) = Request::read(&mut reader)? {
            if self.lock().down {
                return writer.shutdown(Shutdown::Both);
            }
            if request.query("watch") == Some("true") {
                return self.watch(&request, &mut writer);
            }
            let (status, body) = self.answer(&request);
            write!(
                writer,
                "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )?;
        }
        Ok(())
    }

    fn answer(&self, request: &Request) -> (&'static str, String) {
        let plural = request.plural().to_owned();
        if request.method == "POST" {
            let object = serde_json::from_slice(&request.body).unwrap_or_default();
            self.lock().events.push(object);
            return ("201 Created", String::from_utf8_lossy(&request.body).into_owned());
        }
        if request.method != "GET" {
            return ("200 OK", String::from_utf8_lossy(&request.body).into_owned());
        }
        if let Some(name) = request.path.strip_prefix("/api/v1/nodes/") {
            let state = self.lock();
            let node = state.objects.get("nodes").and_then(|nodes| nodes.get(&format!("/{name}")));
            let missing = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404,
                "reason": "NotFound", "message": format!("nodes {name:?} not found")});
            return match node {
                Some(node) => ("200 OK", node.to_string()),
                None => ("404 Not Found", missing.to_string()),
            };
        }
        let limit = request.query("limit").and_then(|text| text.parse().ok()).unwrap_or(usize::MAX);
        let after = request.query("continue").unwrap_or_default().replace("%2F", "/");
        ("200 OK", self.lock().page(&plural, limit, &after))
    }

    /// Tells everything after the revision that was asked for, for as long as the server is up.
    fn watch(&self, request: &Request, writer: &mut TcpStream) -> io::Result<()> {
        let from: u64 =
            request.query("resourceVersion").and_then(|text| text.parse().ok()).unwrap_or_default();
        let plural = request.plural();
        writer.write_all(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
        )?;
        let mut state = self.lock();
        let breaks = state.breaks;
        let mut next = state.log.partition_point(|(revision, _, _)| *revision <= from);
        loop {
            let mut fresh = String::new();
            for (_, _, line) in state.log[next..].iter().filter(|(_, kind, _)| kind == plural) {
                fresh.push_str(line);
                fresh.push('\n');
            }
            next = state.log.len();
            if state.breaks != breaks {
                let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
                    "code": 410, "reason": "Expired", "message": "too old resource version"}});
                let line = format!("{gone}\n");
                return write!(writer, "{:x}\r\n{line}\r\n0\r\n\r\n", line.len());
            }
            if state.down {
                return writer.shutdown(Shutdown::Both);
            }
            if fresh.is_empty() {
                state = self.changed.wait_timeout(state, BREATH).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            drop(state);
            write!(writer, "{:x}\r\n{fresh}\r\n", fresh.len())?;
            state = self.lock();
        }
    }
}

/// One request, as far as this server reads it.
struct Request {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Request {
    fn read(reader: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split(' ');
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let mut request = Self {
            method: method.to_owned(),
            path: path.to_owned(),
            query: pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            body: Vec::new(),
        };
        let mut length = 0;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value.trim().parse().unwrap_or_default();
            }
        }
        request.body = vec![0; length];
        reader.read_exact(&mut request.body)?;
        Ok(Some(request))
    }

    fn plural(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or_default()
    }

    fn query(&self, name: &str) -> Option<&str> {
        self.query.get(name).map(String::as_str)
    }
}

/// A Service with one port on a cluster address.
#[must_use]
pub fn service(namespace: &str, name: &str, address: SocketAddr, protocol: &str) -> Value {
    let ip = address.ip().to_string();
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": namespace, "uid": format!("uid-{namespace}-{name}")},
        "spec": {
            "type": "ClusterIP", "clusterIP": ip, "clusterIPs": [ip],
            "ipFamilies": [if address.is_ipv4() { "IPv4" } else { "IPv6" }],
            "ports": [{"port": address.port(), "protocol": protocol}],
        },
    })
}

/// An EndpointSlice of a Service; the number tells several of one Service apart.
#[must_use]
pub fn slice(namespace: &str, name: &str, number: usize, endpoints: &[SocketAddr], protocol: &str) -> Value {
    let port = endpoints.first().map_or(8080, SocketAddr::port);
    let family = if endpoints.first().is_none_or(SocketAddr::is_ipv4) { "IPv4" } else { "IPv6" };
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|endpoint| json!({"addresses": [endpoint.ip().to_string()], "conditions": {"ready": true}}))
        .collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{name}-{number}"), "namespace": namespace,
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": family, "endpoints": endpoints,
        "ports": [{"name": "", "port": port, "protocol": protocol}],
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn get(api: &Api, target: &str) -> String {
        let mut stream = TcpStream::connect(api.address).unwrap();
        write!(stream, "GET {target} HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text.split_once("\r\n\r\n").unwrap().1.to_owned()
    }

    #[test]
    fn lists_come_in_pages_that_join_to_the_whole() {
        let api = Api::start().unwrap();
        let vip = "10.96.0.1:80".parse().unwrap();
        api.put_all("services", (0..5).map(|n| service("default", &format!("s{n}"), vip, "TCP")));
        let mut names = Vec::new();
        let mut token = String::new();
        loop {
            let page = get(&api, &format!("/api/v1/services?limit=2&continue={token}"));
            let page: Value = serde_json::from_str(&page).unwrap();
            let items = page["items"].as_array().unwrap();
            names.extend(items.iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()));
            token = page["metadata"]["continue"].as_str().unwrap().to_owned();
            if token.is_empty() {
                break;
            }
        }
        assert_eq!(names, ["s0", "s1", "s2", "s3", "s4"]);
        api.set_empty(true);
        assert!(get(&api, "/api/v1/services").contains("\"items\":[]"));
    }

    #[test]
    fn a_watch_tells_what_came_after_its_revision() {
        let api = Api::start().unwrap();
        let vip = "10.96.0.1:80".parse().unwrap();
        api.put("services", service("default", "a", vip, "TCP"));
        api.put("services", service("default", "b", vip, "TCP"));
        let mut stream = TcpStream::connect(api.address).unwrap();
        write!(stream, "GET /api/v1/services?watch=true&resourceVersion=1 HTTP/1.1\r\n\r\n").unwrap();
        let mut lines =
            BufReader::new(stream).lines().map(Result::unwrap).filter(|line| line.starts_with('{'));
        assert!(lines.next().unwrap().contains("\"b\""));
        api.delete("services", "default", "a");
        assert!(lines.next().unwrap().contains("DELETED"));
    }
}
