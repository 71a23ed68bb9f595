//! What is served while files change.

use std::time::{Duration, Instant};

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

async fn until(done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < DEADLINE, "the new files are not served");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn changed_files_are_served_and_broken_ones_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let (cert, key) = (directory.path().join("a.crt"), directory.path().join("a.key"));
    let write = |pair: &rcgen::CertifiedKey<rcgen::KeyPair>| {
        crate::files::write_private(&key, &pair.signing_key.serialize_pem()).unwrap();
        crate::files::write_private(&cert, &pair.cert.pem()).unwrap();
    };
    let pair = || rcgen::generate_simple_self_signed(["n1".to_owned()]).unwrap();
    let (first, second, third) = (pair(), pair(), pair());
    write(&first);
    let seen = follow::Seen::of(&[cert.clone(), key.clone()]);
    let serving = Serving::from_files(&cert, &key).unwrap();
    // Before anybody follows: what changed since the first look is read too.
    write(&second);
    let cancel = CancellationToken::new();
    let follow = tokio::spawn(follow_files(serving.clone(), cert.clone(), key.clone(), seen, cancel.clone()));
    let served = || serving.current().cert[0].to_vec();
    assert_eq!(served(), first.cert.der().to_vec());
    until(|| served() == second.cert.der().to_vec()).await;
    write(&third);
    until(|| served() == third.cert.der().to_vec()).await;
    std::fs::write(&cert, "half wri").unwrap();
    assert!(serving.reload(&cert, &key).is_err());
    assert_eq!(served(), third.cert.der().to_vec());
    cancel.cancel();
    follow.await.unwrap();
}
