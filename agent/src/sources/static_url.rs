//! Static pods from a URL: a Pod or a PodList, asked for every so often.
//!
//! Output: the complete list after each change, as [`PodEvent::Static`]. While the server cannot be reached or answers
//! nonsense, the pods of its last good answer go on. A pod of a list that cannot be used is told once and leaves the others
//! alone. Redirects are not followed; an `https` server is checked against the CAs of the system.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Limited};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::client::Body;
use kube::{Client, Config};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::manifest::{self, MAX_SIZE, Origin};
use super::pods::{PodEvent, StaticSource};
use crate::chain::chain;

/// Deadline of a request with its answer, as upstream.
const DEADLINE: Duration = Duration::from_secs(10);
/// The server is asked no more often.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);

/// Checks the settings; a sentence that names the field where they cannot work.
pub fn check(url: &str, header: &BTreeMap<String, Vec<String>>) -> Result<(), String> {
    Target::new(url, header).map(|_| ())
}

/// Asks until `cancel`.
pub async fn run(
    (url, header): (String, BTreeMap<String, Vec<String>>),
    node_name: String,
    frequency: Duration,
    events: mpsc::Sender<PodEvent>,
    cancel: CancellationToken,
) {
    let target = match Target::new(&url, &header) {
        Ok(target) => target,
        Err(problem) => {
            // The configuration was checked with the same function.
            warn!("{problem}");
            return cancel.cancelled().await;
        }
    };
    let mut reader = Reader { url, node_name, last: None, told: String::new() };
    loop {
        // Cancel-safe: a request that is cut off changes nothing.
        let answer = tokio::select! {
            () = cancel.cancelled() => return,
            answer = tokio::time::timeout(DEADLINE, target.fetch()) => answer,
        };
        let answer =
            answer.unwrap_or_else(|_elapsed| Err(format!("no answer within {} s", DEADLINE.as_secs())));
        if let Some(pods) = reader.take(answer)
            && events.send(PodEvent::Static(StaticSource::Url, pods)).await.is_err()
        {
            return;
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(frequency.max(SHORTEST_PAUSE)) => {}
        }
    }
}

/// Where to ask.
struct Target {
    base: Uri,
    path: String,
    headers: HeaderMap,
}

impl Target {
    fn new(url: &str, header: &BTreeMap<String, Vec<String>>) -> Result<Self, String> {
        let wrong = |why: &str| format!("staticPodURL {url:?}: {why}");
        let uri: Uri = url.parse().map_err(|error| wrong(&format!("{error}")))?;
        let (Some(scheme @ ("http" | "https")), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(wrong("expected an address as https://host/path"));
        };
        let base = format!("{scheme}://{authority}").parse().map_err(|error| wrong(&format!("{error}")))?;
        let path = uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string);
        let mut headers = HeaderMap::new();
        for (name, values) in header {
            let wrong = |what: &str| format!("staticPodURLHeader {name:?}: not a header's {what}");
            let name: HeaderName = name.parse().map_err(|_invalid| wrong("name"))?;
            for value in values {
                let value = HeaderValue::from_str(value).map_err(|_invalid| wrong("value"))?;
                headers.append(name.clone(), value);
            }
        }
        Ok(Self { base, path, headers })
    }

    /// The answer's bytes.
    async fn fetch(&self) -> Result<Vec<u8>, String> {
        let client = Client::try_from(Config::new(self.base.clone())).map_err(|error| chain(&error))?;
        let mut request =
            Request::get(self.path.as_str()).body(Body::empty()).map_err(|error| error.to_string())?;
        *request.headers_mut() = self.headers.clone();
        let response = client.send(request).await.map_err(|error| chain(&error))?;
        if response.status() != StatusCode::OK {
            return Err(format!("the server answered {}", response.status()));
        }
        let most = usize::try_from(MAX_SIZE).unwrap_or(usize::MAX);
        let body = Limited::new(response.into_body(), most).collect().await;
        body.map(|body| body.to_bytes().to_vec()).map_err(|error| format!("{error}"))
    }
}

struct Reader {
    url: String,
    node_name: String,
    /// The last good answer.
    last: Option<Vec<u8>>,
    /// What the log has been told.
    told: String,
}

impl Reader {
    /// The pods, where the answer is another one than the last.
    fn take(&mut self, answer: Result<Vec<u8>, String>) -> Option<Vec<Arc<Pod>>> {
        let bytes = match answer {
            Ok(bytes) if self.last.as_ref() == Some(&bytes) => {
                self.tell("");
                return None;
            }
            Ok(bytes) => bytes,
            Err(problem) => {
                self.tell(&format!("static pods are left as they are: {problem}"));
                return None;
            }
        };
        match self.pods(&bytes) {
            Ok((pods, problems)) => {
                self.tell(&problems.join("; "));
                self.last = Some(bytes);
                Some(pods)
            }
            Err(problem) => {
                self.tell(&format!("static pods are left as they are: {problem}"));
                None
            }
        }
    }

    /// The pods that can run, and what is wrong with the others.
    fn pods(&self, bytes: &[u8]) -> Result<(Vec<Arc<Pod>>, Vec<String>), String> {
        // As upstream: a server that is there and has nothing to say.
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok((Vec::new(), vec!["the answer is empty: no static pods".to_owned()]));
        }
        let origin =
            Origin { node_name: &self.node_name, source: "http", file: &self.url, seen: Timestamp::now() };
        let (mut pods, mut problems) = (BTreeMap::new(), Vec::new());
        for (place, pod) in manifest::parse_several(bytes, origin)?.into_iter().enumerate() {
            match pod {
                Ok(pod) => {
                    let key = (pod.metadata.namespace.clone(), pod.metadata.name.clone());
                    if pods.insert(key, Arc::new(pod)).is_some() {
                        problems
                            .push(format!("items[{place}] has the name of another: the later one counts"));
                    }
                }
                Err(problem) => problems.push(format!("items[{place}] is not used: {problem}")),
            }
        }
        Ok((pods.into_values().collect(), problems))
    }

    /// Logs a problem once, and its end.
    fn tell(&mut self, problem: &str) {
        if self.told == problem {
            return;
        }
        if problem.is_empty() {
            info!(url = %self.url, "static pods are good now");
        } else {
            warn!(url = %self.url, "{problem}");
        }
        problem.clone_into(&mut self.told);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    const TEST_DEADLINE: Duration = Duration::from_secs(20);

    fn pod(name: &str, image: &str) -> String {
        format!(
            r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}"}},"spec":{{"containers":[{{"name":"a","image":"{image}"}}]}}}}"#
        )
    }

    fn list(pods: &[String]) -> String {
        format!(r#"{{"apiVersion":"v1","kind":"PodList","items":[{}]}}"#, pods.join(","))
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<String> {
        pods.iter().filter_map(|pod| pod.metadata.name.clone()).collect()
    }

    fn reader() -> Reader {
        Reader { url: "http://x/".to_owned(), node_name: "n".to_owned(), last: None, told: String::new() }
    }

    #[test]
    fn one_bad_pod_or_answer_leaves_the_others_alone() {
        let mut reader = reader();
        let mut take = |answer: Result<&str, &str>| {
            reader.take(answer.map(|text| text.as_bytes().to_vec()).map_err(str::to_owned))
        };
        let bad = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"bad"},"spec":{"containers":[]}}"#;
        let several = list(&[pod("a", "i"), bad.to_owned(), pod("b", "i")]);
        assert_eq!(names(&take(Ok(&several)).unwrap()), ["a-n", "b-n"]);
        assert!(take(Ok(&several)).is_none(), "nothing new");
        assert!(take(Ok("<html>")).is_none() && take(Err("refused")).is_none(), "the pods go on");
        assert_eq!(names(&take(Ok(&pod("one", "i"))).unwrap()), ["one-n"]);
        assert_eq!(names(&take(Ok("")).unwrap()), [""; 0]);
        let nameless = r#"{"apiVersion":"v1","kind":"PodList","items":[{"metadata":{"name":"c"},"spec":{"containers":[{"name":"a","image":"i"}]}}]}"#;
        assert_eq!(names(&take(Ok(nameless)).unwrap()), ["c-n"], "items of a list need no kind");
    }

    #[test]
    fn settings_that_cannot_work_are_named() {
        let none = BTreeMap::new();
        assert!(check("https://host:1/a?b=c", &none).is_ok());
        for url in ["host/path", "ftp://host/", "http://", "http://a b/"] {
            assert!(check(url, &none).is_err_and(|why| why.contains("staticPodURL")), "{url}");
        }
        let header = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), vec![value.to_owned()])]);
        assert!(check("http://h/", &header("Metadata-Flavor", "Google")).is_ok());
        assert!(check("http://h/", &header("a b", "x")).is_err_and(|why| why.contains("name")));
        assert!(check("http://h/", &header("a", "x\n")).is_err_and(|why| why.contains("value")));
    }

    /// Answers the given bodies one after the other, the last one for ever; what each request said.
    async fn server(bodies: Vec<String>) -> (String, mpsc::UnboundedReceiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/pods?x=1", listener.local_addr().unwrap());
        let (said, requests) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut bodies = bodies.into_iter().peekable();
            let mut last = String::new();
            loop {
                let Ok((mut stream, _)) = listener.accept().await else { return };
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { break };
                    request.push(byte);
                }
                said.send(String::from_utf8_lossy(&request).to_lowercase()).ok();
                last = bodies.next().unwrap_or(last);
                let head =
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", last.len());
                stream.write_all(format!("{head}{last}").as_bytes()).await.ok();
            }
        });
        (url, requests)
    }

    #[tokio::test]
    async fn answers_become_events() {
        rustls::crypto::aws_lc_rs::default_provider().install_default().ok();
        let (url, mut requests) = server(vec![pod("a", "i"), "nonsense".to_owned(), pod("b", "i")]).await;
        let header = BTreeMap::from([("X-Node".to_owned(), vec!["one".to_owned()])]);
        let (sender, mut events) = mpsc::channel(4);
        let cancel = CancellationToken::new();
        let pause = Duration::from_secs(1);
        let task = tokio::spawn(run((url, header), "n".to_owned(), pause, sender, cancel.clone()));
        for expected in ["a-n", "b-n"] {
            let event = tokio::time::timeout(TEST_DEADLINE, events.recv()).await.expect("in time");
            let Some(PodEvent::Static(StaticSource::Url, pods)) = event else { panic!("{event:?}") };
            assert_eq!(names(&pods), [expected]);
        }
        let request = requests.recv().await.expect("a request");
        assert!(request.starts_with("get /pods?x=1 ") && request.contains("x-node: one"), "{request}");
        cancel.cancel();
        task.await.unwrap();
    }
}
