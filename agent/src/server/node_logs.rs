//! `/logs/`: the node's `/var/log`, and with `?query=` what its services say.
//!
//! Input: a path below the directory, or names of services (or one file) with filters. Output: a file as a stream, a listing of a
//! directory, or what `journalctl` prints; where there is no journal, the service's file. Nothing outside the directory is
//! shown, but for what links in it lead to, as upstream.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use cri_shim_streaming::BodyError;
use futures::StreamExt as _;
use http::{HeaderValue, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use tokio_util::io::ReaderStream;

use super::reply::{self, Reply};
use super::routes::{Api, Query};

/// How long the journal may be searched, as upstream.
const JOURNAL_DEADLINE: std::time::Duration = std::time::Duration::from_secs(30);

/// Enough to tell text from anything else.
const SNIFFED: usize = 512;

/// Answers a GET of `path`, which is what follows `/logs`.
pub(super) async fn answer(api: &Api, path: &str, query: &Query) -> Reply {
    let settings = &api.config.settings;
    if !settings.system_logs {
        return reply::text(StatusCode::METHOD_NOT_ALLOWED, "logs endpoint is disabled.");
    }
    if settings.log_query && query.first(&["query"]).is_some() {
        if !path.trim_matches('/').is_empty() {
            return reply::text(StatusCode::NOT_ACCEPTABLE, "path not allowed in query mode");
        }
        return match NodeLogQuery::parse(query) {
            Ok(query) => query.answer(&settings.log_root).await,
            Err(problem) => reply::text(StatusCode::BAD_REQUEST, problem),
        };
    }
    let Some(relative) = safe_path(path) else { return not_found() };
    let found = settings.log_root.join(relative);
    match tokio::fs::metadata(&found).await {
        Ok(metadata) if metadata.is_dir() && !path.ends_with('/') => redirect(path),
        Ok(metadata) if metadata.is_dir() => listing(found).await,
        Ok(metadata) if metadata.is_file() => file(&found, metadata.len()).await,
        _ => not_found(),
    }
}

fn not_found() -> Reply {
    reply::text(StatusCode::NOT_FOUND, "404 page not found\n")
}

/// A path below a directory, decoded; `None` for one that would leave it.
fn safe_path(path: &str) -> Option<PathBuf> {
    let mut safe = PathBuf::new();
    for part in path.split('/').filter(|part| !part.is_empty()) {
        let part = decoded(part)?;
        if part == ".." || part == "." || part.contains(['/', '\0']) {
            return None;
        }
        safe.push(part);
    }
    Some(safe)
}

/// `%XX` put in.
fn decoded(part: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let value = digit(rest.next()?)? * 16 + digit(rest.next()?)?;
        bytes.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(bytes).ok()
}

/// Links in a listing are relative to the directory, which therefore ends in a slash.
fn redirect(path: &str) -> Reply {
    let last = path.rsplit('/').next().unwrap_or_default();
    let place = if last.is_empty() { "logs/".to_owned() } else { format!("{last}/") };
    let mut answer = reply::text(StatusCode::MOVED_PERMANENTLY, "");
    if let Ok(place) = HeaderValue::from_str(&place) {
        answer.headers_mut().insert(header::LOCATION, place);
    }
    answer
}

async fn listing(dir: PathBuf) -> Reply {
    let read = tokio::task::spawn_blocking(move || {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&dir)? {
            let entry = entry?;
            let slash = if entry.path().is_dir() { "/" } else { "" };
            names.push(format!("{}{slash}", entry.file_name().to_string_lossy()));
        }
        names.sort();
        std::io::Result::Ok(names)
    });
    let names = match read.await.map_err(std::io::Error::other).and_then(|names| names) {
        Ok(names) => names,
        Err(error) => return reply::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    };
    let mut text =
        "<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n<pre>\n".to_owned();
    for name in names {
        // Writing to a String cannot fail.
        writeln!(text, "<a href=\"{}\">{}</a>", encoded(&name), escaped(&name)).ok();
    }
    text.push_str("</pre>\n");
    reply::with_type(StatusCode::OK, "text/html; charset=utf-8", text)
}

/// A name as a relative address.
fn encoded(name: &str) -> String {
    let mut text = String::new();
    for byte in name.bytes() {
        let is_plain = byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
        let written =
            if is_plain { write!(text, "{}", char::from(byte)) } else { write!(text, "%{byte:02X}") };
        // Writing to a String cannot fail.
        written.ok();
    }
    text
}

fn escaped(name: &str) -> String {
    name.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;")
}

/// The file as far as it goes now.
async fn file(path: &Path, length: u64) -> Reply {
    let mut file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) => return reply::text(StatusCode::FORBIDDEN, error.to_string()),
    };
    let mut head = vec![0; SNIFFED.min(usize::try_from(length).unwrap_or(SNIFFED))];
    let read = match file.read(&mut head).await {
        Ok(read) => read,
        Err(error) => return reply::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    };
    head.truncate(read);
    let kind = if head.contains(&0) || head.starts_with(&[0x1f, 0x8b]) {
        "application/octet-stream"
    } else {
        "text/plain; charset=utf-8"
    };
    let rest = file.take(length.saturating_sub(read as u64));
    stream(std::io::Cursor::new(head).chain(rest), kind)
}

fn stream(reader: impl AsyncRead + Send + Sync + 'static, kind: &'static str) -> Reply {
    let frames = ReaderStream::new(reader).map(|chunk| chunk.map(Frame::data).map_err(BodyError::from));
    let mut answer = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

/// What `?query=` asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct NodeLogQuery {
    services: Vec<String>,
    /// A file below the directory, asked for alone.
    file: Option<String>,
    /// Arguments of `journalctl` for the filters.
    filters: Vec<String>,
}

impl NodeLogQuery {
    fn parse(query: &Query) -> Result<Self, String> {
        let mut parsed = Self::default();
        for name in query.all("query") {
            if name.starts_with('/') {
                if parsed.file.replace(name).is_some() {
                    return Err("query: Invalid value: specify only one file".to_owned());
                }
                continue;
            }
            let is_safe = |c: char| c.is_ascii_alphanumeric() || "-_.:@".contains(c);
            if name.is_empty() || name.starts_with('-') || !name.chars().all(is_safe) {
                return Err(format!(
                    "query: Invalid value: {name:?}: unsafe characters in the name of a service"
                ));
            }
            parsed.services.push(name);
        }
        for name in ["sinceTime", "untilTime"] {
            let Some(text) = query.first(&[name]) else { continue };
            let time: jiff::Timestamp = text
                .parse()
                .map_err(|_error| format!("{name}: Invalid value: {text:?}: invalid RFC3339 time"))?;
            let option = if name == "sinceTime" { "since" } else { "until" };
            let time = time.strftime("%Y-%m-%d %H:%M:%S UTC");
            parsed.filters.push(format!("--{option}={time}"));
        }
        if let Some(text) = query.first(&["tailLines"]) {
            let lines: u32 = text
                .parse()
                .map_err(|_error| format!("tailLines: Invalid value: {text:?}: not a number of lines"))?;
            parsed.filters.push(format!("--lines={lines}"));
        }
        if let Some(text) = query.first(&["boot"]) {
            let boot: i32 =
                text.parse().map_err(|_error| format!("boot: Invalid value: {text:?}: not a number"))?;
            if boot > 0 {
                return Err(format!("boot: Invalid value: {boot}: must be less than 1"));
            }
            parsed.filters.push(format!("--boot={boot}"));
        }
        if let Some(pattern) = query.first(&["pattern"]) {
            parsed.filters.push(format!("--grep={pattern}"));
            parsed.filters.push("--case-sensitive=false".to_owned());
        }
        if parsed.file.is_some() && !(parsed.services.is_empty() && parsed.filters.is_empty()) {
            return Err(
                "query: Invalid value: cannot specify a file together with services or options".to_owned()
            );
        }
        Ok(parsed)
    }

    async fn answer(self, root: &Path) -> Reply {
        if let Some(name) = &self.file {
            return match safe_path(name) {
                Some(path) => first_file(&[root.join(path)]).await,
                None => not_found(),
            };
        }
        match self.journal() {
            Ok(reader) => stream(reader, "text/plain; charset=utf-8"),
            // A node without a journal: the service's own file, wherever it usually is.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let files: Vec<PathBuf> =
                    self.services.iter().flat_map(|name| usual_files(root, name)).collect();
                first_file(&files).await
            }
            Err(error) => reply::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    }

    /// What `journalctl` prints, errors included.
    fn journal(&self) -> std::io::Result<impl AsyncRead + Send + Sync + 'static + use<>> {
        let units = self.services.iter().map(|name| format!("--unit={name}"));
        let mut child = Command::new("journalctl")
            .args(["--utc", "--no-pager", "--output=short-precise"])
            .args(&self.filters)
            .args(units)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let missing = || std::io::Error::other("journalctl has no output");
        let output = child.stdout.take().ok_or_else(missing)?;
        let problems = child.stderr.take().ok_or_else(missing)?;
        // It ends with its pipes, which close when the client has gone; one that has found nothing yet does not notice that.
        tokio::spawn(async move { tokio::time::timeout(JOURNAL_DEADLINE, child.wait()).await.is_ok() });
        Ok(output.chain(problems))
    }
}

/// Where services without a journal write.
fn usual_files(root: &Path, service: &str) -> [PathBuf; 3] {
    [
        root.join(service),
        root.join(format!("{service}.log")),
        root.join(service).join(format!("{service}.log")),
    ]
}

/// The first of them that is a file.
async fn first_file(paths: &[PathBuf]) -> Reply {
    for path in paths {
        if let Ok(metadata) = tokio::fs::metadata(path).await
            && metadata.is_file()
        {
            return file(path, metadata.len()).await;
        }
    }
    not_found()
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parse(text: &str) -> Result<NodeLogQuery, String> {
        NodeLogQuery::parse(&Query::of(&Request::builder().uri(format!("/logs/?{text}")).body(()).unwrap()))
    }

    #[test]
    fn paths_stay_below_the_directory() {
        assert_eq!(safe_path("/pods/a%20b//0.log"), Some(PathBuf::from("pods/a b/0.log")));
        assert_eq!(safe_path("/"), Some(PathBuf::new()));
        for path in ["/../etc/passwd", "/a/%2e%2e/b", "/a%2Fb", "/a%00", "/%zz", "/%ff"] {
            assert_eq!(safe_path(path), None, "{path}");
        }
    }

    #[test]
    fn queries_become_arguments_of_the_journal() {
        let query = parse(
            "query=kubelet&query=containerd@1&sinceTime=2026-01-02T03:04:05Z&tailLines=9&boot=-1&pattern=x%20y",
        );
        let query = query.unwrap();
        assert_eq!(query.services, ["kubelet", "containerd@1"]);
        assert_eq!(
            query.filters,
            [
                "--since=2026-01-02 03:04:05 UTC",
                "--lines=9",
                "--boot=-1",
                "--grep=x y",
                "--case-sensitive=false"
            ]
        );
        assert_eq!(parse("query=/kubelet.log").unwrap().file.as_deref(), Some("/kubelet.log"));
        for wrong in [
            "query=a;b",
            "query=--root",
            "query=/a&query=/b",
            "query=/a&tailLines=1",
            "query=a&tailLines=x",
            "query=a&boot=1",
            "query=a&sinceTime=yesterday",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn directories_are_listed_and_files_streamed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("pods")).unwrap();
        std::fs::write(dir.path().join("a<b.log"), "hello\n").unwrap();
        let body = async |answer: Reply| {
            let bytes = answer.into_body().collect().await.unwrap().to_bytes();
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        let listed = body(listing(dir.path().to_owned()).await).await;
        assert!(
            listed.contains("<a href=\"a%3Cb.log\">a&lt;b.log</a>\n<a href=\"pods/\">pods/</a>\n"),
            "{listed}"
        );
        let shown = file(&dir.path().join("a<b.log"), 6).await;
        assert_eq!(shown.headers()[header::CONTENT_TYPE], "text/plain; charset=utf-8");
        assert_eq!(body(shown).await, "hello\n");
        assert_eq!(redirect("/pods").headers()[header::LOCATION], "pods/");
    }
}
