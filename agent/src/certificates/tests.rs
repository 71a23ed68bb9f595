//! What is served while files change.

use std::time::Instant;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn changed_files_are_served_and_broken_ones_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let (cert, key) = (directory.path().join("a.crt"), directory.path().join("a.key"));
    let write = |pair: &rcgen::CertifiedKey<rcgen::KeyPair>| {
        files::write_private(&key, &pair.signing_key.serialize_pem()).unwrap();
        files::write_private(&cert, &pair.cert.pem()).unwrap();
    };
    let pair = || rcgen::generate_simple_self_signed(["n1".to_owned()]).unwrap();
    let (first, second) = (pair(), pair());
    write(&first);
    let serving = Serving::from_files(&cert, &key).unwrap();
    let cancel = CancellationToken::new();
    let follow = tokio::spawn(follow_files(serving.clone(), cert.clone(), key.clone(), cancel.clone()));
    let served = || serving.current().cert[0].to_vec();
    assert_eq!(served(), first.cert.der().to_vec());
    let begin = Instant::now();
    while served() != second.cert.der().to_vec() {
        assert!(begin.elapsed() < DEADLINE, "the new files are not served");
        // Again and again: the watch may not have been there yet.
        write(&second);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    std::fs::write(&cert, "half wri").unwrap();
    assert!(serving.reload(&cert, &key).is_err());
    assert_eq!(served(), second.cert.der().to_vec());
    cancel.cancel();
    follow.await.unwrap();
}
