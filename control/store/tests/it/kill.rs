//! A writer process is killed in the middle of its work; whatever it acknowledged must be there afterwards.

use std::{
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use bytes::Bytes;
use control_store::{Range, RedbOptions, RedbStore, Revision, Store as _, Txn};

const DIRECTORY: &str = "KEELSON_STORE_KILL_DIRECTORY";

/// Not a test of its own: the process that the test below starts and kills.
#[test]
fn writer_process() {
    let Ok(directory) = std::env::var(DIRECTORY) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = RedbStore::open(&RedbOptions::new(format!("{directory}/store.redb"))).unwrap();
        for number in 0_u64.. {
            let key = Bytes::from(format!("/k/{number:06}"));
            let revision = store.txn(Txn::create(key, Bytes::from(vec![7; 300]))).await.unwrap();
            println!("ack {number} {revision}");
        }
    });
}

#[tokio::test]
async fn acknowledged_writes_survive_kill_9() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kill::writer_process", "--nocapture"])
        .env(DIRECTORY, directory.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let acknowledged: Vec<(u64, u64)> =
        lines.map_while(Result::ok).filter_map(|line| acknowledgement(&line)).take(60).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(acknowledged.len(), 60);

    let store = RedbStore::open(&RedbOptions::new(directory.path().join("store.redb"))).unwrap();
    let page = store.range(Range { prefix: Bytes::from_static(b"/k/"), ..Range::default() }).await.unwrap();
    for (number, revision) in &acknowledged {
        assert_eq!(page.items[usize::try_from(*number).unwrap()].modified, Revision(*revision));
    }
    let next = store.txn(Txn::create(Bytes::from_static(b"/z"), Bytes::new())).await.unwrap();
    assert!(next > Revision(acknowledged.last().unwrap().1), "no revision is given twice");
}

/// `… ack NUMBER REVISION`; the test harness may print something of its own before it on the line.
fn acknowledgement(line: &str) -> Option<(u64, u64)> {
    let (number, revision) = line.rsplit_once("ack ")?.1.split_once(' ')?;
    Some((number.parse().ok()?, revision.parse().ok()?))
}
