//! Reading and following real files, with a fake container that ends when told.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use k8s_openapi::api::core::v1::Pod;

use super::super::QUEUE;
use super::*;
use crate::contracts::{ContainerRef, LookupError, PodLookup};

struct FakePods {
    running: AtomicBool,
}

impl PodLookup for FakePods {
    fn pods(&self) -> Vec<Arc<Pod>> {
        Vec::new()
    }

    fn container(&self, _: &str, _: &str, _: Option<&str>, _: &str) -> Result<ContainerRef, LookupError> {
        Ok(ContainerRef {
            id: "c1".to_owned(),
            pod_uid: "u1".to_owned(),
            log_path: PathBuf::new(),
            running: self.running.load(Ordering::Relaxed),
        })
    }

    fn previous_container(
        &self,
        _: &str,
        pod: &str,
        _: Option<&str>,
        c: &str,
    ) -> Result<ContainerRef, LookupError> {
        Err(LookupError::NoPrevious { pod: pod.to_owned(), container: c.to_owned() })
    }

    fn sandbox(&self, _: &str, pod: &str, _: Option<&str>) -> Result<String, LookupError> {
        Err(LookupError::NotRunning { pod: pod.to_owned() })
    }
}

fn watched(pods: &Arc<FakePods>) -> Watched {
    Watched {
        state: Arc::clone(pods) as _,
        namespace: "ns".to_owned(),
        pod: "p".to_owned(),
        uid: "u1".to_owned(),
        container: "c".to_owned(),
        id: "c1".to_owned(),
        ended: false,
    }
}

fn append(path: &Path, lines: std::ops::Range<u32>) {
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    for number in lines {
        writeln!(file, "2026-01-01T00:00:00Z stdout F line {number}").unwrap();
    }
}

/// A reader that follows the log of a container that runs.
struct Follower {
    pods: Arc<FakePods>,
    receiver: mpsc::Receiver<Result<Bytes, BodyError>>,
    sender: mpsc::Sender<Result<Bytes, BodyError>>,
    reader: LogReader,
}

impl Follower {
    /// Opens the log; what happens to the files before [`Follower::start`] finds the reader with the first one.
    async fn open(path: &Path) -> Self {
        let options = LogOptions { follow: true, ..LogOptions::default() };
        let reader = LogReader::open(path, options).await.unwrap();
        let (sender, receiver) = mpsc::channel(QUEUE);
        Self { pods: Arc::new(FakePods { running: AtomicBool::new(true) }), receiver, sender, reader }
    }

    fn start(self) -> Following {
        let Self { pods, receiver, sender, reader } = self;
        let container = watched(&pods);
        let task = tokio::spawn(async move { reader.run(&sender, &container).await.unwrap() });
        Following { pods, receiver, task }
    }
}

/// One that reads.
struct Following {
    pods: Arc<FakePods>,
    receiver: mpsc::Receiver<Result<Bytes, BodyError>>,
    task: tokio::task::JoinHandle<()>,
}

impl Following {
    async fn next(&mut self) -> String {
        let chunk = tokio::time::timeout(Duration::from_secs(10), self.receiver.recv()).await;
        let chunk = chunk.expect("a chunk in time").expect("an open stream").unwrap();
        String::from_utf8(chunk.to_vec()).unwrap()
    }

    fn container_ends(&self) {
        self.pods.running.store(false, Ordering::Relaxed);
    }

    /// Waits for the reader's end; nothing may come before it.
    async fn ends(mut self) {
        let last = tokio::time::timeout(Duration::from_secs(10), self.receiver.recv()).await;
        assert!(last.expect("an end in time").is_none());
        self.task.await.unwrap();
    }
}

async fn read_all(path: &Path, options: LogOptions) -> String {
    let pods = Arc::new(FakePods { running: AtomicBool::new(true) });
    let reader = LogReader::open(path, options).await.unwrap();
    let (sender, mut receiver) = mpsc::channel(100);
    reader.run(&sender, &watched(&pods)).await.unwrap();
    drop(sender);
    let mut text = String::new();
    while let Some(chunk) = receiver.recv().await {
        text.push_str(std::str::from_utf8(&chunk.unwrap()).unwrap());
    }
    text
}

#[tokio::test]
async fn tails_count_lines_across_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    append(&path, 0..5000);
    let tail = |lines| LogOptions { tail: Some(lines), ..LogOptions::default() };
    assert_eq!(read_all(&path, tail(2)).await, "line 4998\nline 4999\n");
    assert_eq!(read_all(&path, tail(0)).await, "");
    assert_eq!(read_all(&path, tail(4000)).await.lines().count(), 4000);
    assert_eq!(read_all(&path, tail(9000)).await.lines().count(), 5000);
    assert_eq!(read_all(&path, LogOptions::default()).await.lines().count(), 5000);
}

#[tokio::test]
async fn following_goes_on_after_rotation_and_ends_with_the_container() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    append(&path, 0..1);
    let mut log = Follower::open(&path).await.start();
    assert_eq!(log.next().await, "line 0\n");
    append(&path, 1..2);
    assert_eq!(log.next().await, "line 1\n");
    std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
    append(&dir.path().join("0.log.1"), 2..3);
    assert_eq!(log.next().await, "line 2\n");
    append(&path, 3..4);
    assert_eq!(log.next().await, "line 3\n");
    append(&path, 4..5);
    log.container_ends();
    assert_eq!(log.next().await, "line 4\n");
    log.ends().await;
}

#[tokio::test]
async fn a_client_that_goes_away_ends_the_task() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    append(&path, 0..1);
    let Following { pods, receiver, task } = Follower::open(&path).await.start();
    drop(receiver);
    tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
    assert!(pods.running.load(Ordering::Relaxed), "the client ended it, not the container");
}

/// Second `second` of the year, one line.
fn append_at(path: &Path, second: u32) {
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    writeln!(file, "2026-01-01T00:00:{second:02}.000000001Z stdout F line {second}").unwrap();
}

#[tokio::test]
async fn a_slow_follower_reads_every_rotated_file_in_its_turn() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    append_at(&path, 0);
    let follower = Follower::open(&path).await;
    // The reader has opened the first file; before it reads on, the log is rotated twice, and once compressed.
    append_at(&path, 1);
    std::fs::rename(&path, dir.path().join("0.log.20260101-000001")).unwrap();
    append_at(&path, 2);
    let packed = File::create(dir.path().join("0.log.20260101-000002.gz")).await.unwrap().into_std().await;
    let mut packer = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
    packer.write_all(&std::fs::read(&path).unwrap()).unwrap();
    packer.finish().unwrap();
    std::fs::remove_file(&path).unwrap();
    append_at(&path, 3);
    let mut log = follower.start();
    let mut text = String::new();
    while !text.contains("line 3") {
        text.push_str(&log.next().await);
    }
    assert_eq!(text, "line 0\nline 1\nline 2\nline 3\n");
    log.container_ends();
    log.ends().await;
}

#[tokio::test]
async fn the_old_file_is_read_until_the_container_writes_to_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    append_at(&path, 0);
    let mut log = Follower::open(&path).await.start();
    assert_eq!(log.next().await, "line 0\n");
    let old = dir.path().join("0.log.20260101-000001");
    std::fs::rename(&path, &old).unwrap();
    File::create(&path).await.unwrap();
    append_at(&old, 1);
    assert_eq!(log.next().await, "line 1\n");
    append_at(&path, 2);
    assert_eq!(log.next().await, "line 2\n");
    log.container_ends();
    log.ends().await;
}
