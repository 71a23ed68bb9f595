//! Faults below the database: a disk that is full for a while, and files that are no store.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use redb::{Database, StorageBackend, backends::FileBackend};

use super::*;

/// A file backend that fails to grow, write and sync while the flag is set.
#[derive(Debug)]
struct Faulty {
    file: FileBackend,
    full: Arc<AtomicBool>,
}

impl Faulty {
    fn check(&self) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl StorageBackend for Faulty {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check()?;
        self.file.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.check()?;
        self.file.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        self.file.write(offset, data)
    }
    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

fn key(name: &str) -> Bytes {
    Bytes::copy_from_slice(name.as_bytes())
}

#[tokio::test]
async fn a_full_disk_refuses_writes_keeps_reads_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    let full = Arc::new(AtomicBool::new(false));
    let open = {
        let (path, full) = (path.clone(), Arc::clone(&full));
        move || {
            let file = std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            let backend = Faulty { file: FileBackend::new(file)?, full: Arc::clone(&full) };
            Ok(Database::builder().create_with_backend(backend)?)
        }
    };
    let store = RedbStore::start(Engine::with_backend(path, Box::new(open)).unwrap()).unwrap();
    let first = store.txn(Txn::create(key("/a"), key("1"))).await.unwrap();

    full.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let refused = store.txn(Txn::create(key("/b"), key("2"))).await.unwrap_err();
        assert!(matches!(refused, StoreError::Unavailable { .. }), "{refused}");
    }

    full.store(false, Ordering::SeqCst);
    let second = store.txn(Txn::create(key("/b"), key("2"))).await.unwrap();
    assert_eq!(second, first.next(), "failed commits use no revision");
    assert_eq!(store.get(key("/a")).await.unwrap().unwrap().value, key("1"));
    assert_eq!(store.get(key("/b")).await.unwrap().unwrap().value, key("2"));
}

#[test]
fn a_file_that_is_no_store_is_refused_with_its_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    std::fs::write(&path, vec![0x55; 64 << 10]).unwrap();
    let refused = RedbStore::open(&RedbOptions::new(&path)).unwrap_err();
    assert!(refused.to_string().contains(path.to_str().unwrap()), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), vec![0x55; 64 << 10], "it is left as it was");
}
