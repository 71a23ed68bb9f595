//! Who may use which image, by tables and at random.

use proptest::prelude::*;

use super::*;

const APP: &str = "r.example/team/app";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("in range")
}

fn secret(name: &str, hash: &str) -> PullSecret {
    PullSecret {
        uid: format!("uid-{name}"),
        namespace: "ns".to_owned(),
        name: name.to_owned(),
        credential_hash: hash.to_owned(),
    }
}

fn pulled_with(credentials: PullCredentials) -> Known {
    let mut record = PulledRecord::new("sha256:1", at(1));
    record.add(APP, credentials, at(1));
    Known::Record(record)
}

fn allowlist(patterns: &[&str]) -> Policy {
    let patterns: Vec<String> = patterns.iter().map(|&pattern| pattern.to_owned()).collect();
    Policy::NeverVerifyAllowlistedImages(Allowlist::parse(&patterns).expect("patterns"))
}

#[test]
fn policies_say_for_whom_an_image_that_is_there_is_free() {
    let pulled = Known::Record(PulledRecord::new("sha256:1", at(1)));
    for (policy, of_nobody, of_the_agent) in [
        (Policy::NeverVerify, Access::Allowed, Access::Allowed),
        (Policy::NeverVerifyPreloadedImages, Access::Allowed, Access::MustAuthenticate),
        (allowlist(&["r.example/team/*"]), Access::Allowed, Access::Allowed),
        (allowlist(&[APP]), Access::Allowed, Access::Allowed),
        (
            allowlist(&["r.example/team", "r.example/te/*"]),
            Access::MustAuthenticate,
            Access::MustAuthenticate,
        ),
        (Policy::AlwaysVerify, Access::MustAuthenticate, Access::MustAuthenticate),
    ] {
        assert_eq!(access(&policy, APP, &Known::Nothing, &[]), of_nobody, "{policy:?}");
        assert_eq!(access(&policy, APP, &Known::Pulling, &[]), of_the_agent, "{policy:?}");
        assert_eq!(access(&policy, APP, &pulled, &[]), of_the_agent, "{policy:?}");
    }
}

#[test]
fn a_secret_lets_in_by_its_content_or_its_name() {
    let known = pulled_with(PullCredentials::of_secret(secret("a", "one")));
    let verdict = |own: &[PullSecret]| access(&Policy::AlwaysVerify, APP, &known, own);
    assert_eq!(verdict(&[]), Access::MustAuthenticate);
    assert_eq!(verdict(&[secret("a", "one")]), Access::Found { learned: None });
    assert_eq!(verdict(&[secret("b", "two")]), Access::MustAuthenticate);
    let renewed = secret("a", "two");
    assert_eq!(verdict(std::slice::from_ref(&renewed)), Access::Found { learned: Some(renewed) });
    let copied = secret("b", "one");
    assert_eq!(verdict(&[secret("c", "x"), copied.clone()]), Access::Found { learned: Some(copied) });
    let elsewhere = access(&Policy::AlwaysVerify, "r.example/team/b", &known, &[secret("a", "one")]);
    assert_eq!(elsewhere, Access::MustAuthenticate, "the same image by another name");
    let open = pulled_with(PullCredentials::none_needed());
    assert_eq!(access(&Policy::AlwaysVerify, APP, &open, &[]), Access::Found { learned: None });
}

#[test]
fn what_nobody_could_hash_matches_nobody() {
    let known = pulled_with(PullCredentials::of_secret(secret("a", "")));
    let stranger = access(&Policy::AlwaysVerify, APP, &known, &[secret("b", "")]);
    assert_eq!(stranger, Access::MustAuthenticate);
}

#[test]
fn a_full_record_learns_nothing_more() {
    let mut all = PullCredentials::default();
    for number in 0..MOST_LEARNED {
        assert!(all.add(PullCredentials::of_secret(secret(&number.to_string(), "one"))));
    }
    let known = pulled_with(all);
    let verdict = |own| access(&Policy::AlwaysVerify, APP, &known, &[own]);
    assert_eq!(verdict(secret("new", "one")), Access::Found { learned: None });
    assert_eq!(verdict(secret("1", "renewed")), Access::MustAuthenticate);
}

#[test]
fn the_last_of_a_renewed_secret_counts_and_open_images_stay_open() {
    let mut record = PulledRecord::new("sha256:1", at(1));
    assert!(!record.add(APP, PullCredentials::default(), at(2)), "nothing is known, and nobody gets in");
    assert!(record.add(APP, PullCredentials::of_secret(secret("b", "one")), at(3)));
    assert!(!record.add(APP, PullCredentials::of_secret(secret("b", "one")), at(4)));
    assert_eq!(record.last_updated, at(3));
    assert!(record.add(APP, PullCredentials::of_secret(secret("b", "two")), at(5)));
    assert!(record.add(APP, PullCredentials::of_secret(secret("a", "one")), at(6)));
    let names = |record: &PulledRecord| -> Vec<(String, String)> {
        let secrets = record.credentials[APP].kubernetes_secrets.iter();
        secrets.map(|one| (one.name.clone(), one.credential_hash.clone())).collect()
    };
    assert_eq!(
        names(&record),
        [("a".to_owned(), "one".to_owned()), ("b".to_owned(), "two".to_owned())],
        "in the order of their names"
    );
    assert!(record.add(APP, PullCredentials::none_needed(), at(7)));
    assert_eq!(record.credentials[APP], PullCredentials::none_needed());
    assert!(!record.add(APP, PullCredentials::of_secret(secret("a", "one")), at(8)));
}

#[test]
fn files_are_upstreams() {
    let mut record = PulledRecord::new("testimageref", at(1_729_513_600));
    record.add(
        "docker.io/testing/test",
        PullCredentials::of_secret(PullSecret {
            uid: "testsecretuid".to_owned(),
            namespace: "default".to_owned(),
            name: "pull-secret".to_owned(),
            credential_hash: "testsecrethash".to_owned(),
        }),
        "2024-10-21T12:26:40.5Z".parse().expect("a time"),
    );
    let text = "{\"kind\":\"ImagePulledRecord\",\"apiVersion\":\"kubelet.config.k8s.io/v1beta1\",\
                \"lastUpdatedTime\":\"2024-10-21T12:26:40Z\",\"imageRef\":\"testimageref\",\
                \"credentialMapping\":{\"docker.io/testing/test\":{\"kubernetesSecrets\":[{\"uid\":\"testsecretuid\",\
                \"namespace\":\"default\",\"name\":\"pull-secret\",\"credentialHash\":\"testsecrethash\"}]}}}";
    assert_eq!(written::record(&record), text);
    assert_eq!(written::read_record(&text.replace("v1beta1", "v1alpha1")), Ok(record));
    let intent = "{\"kind\":\"ImagePullIntent\",\"apiVersion\":\"kubelet.config.k8s.io/v1beta1\",\
                  \"image\":\"docker.io/testing/test:latest\"}";
    assert_eq!(written::intent("docker.io/testing/test:latest"), intent);
    assert_eq!(written::read_intent(intent).as_deref(), Ok("docker.io/testing/test:latest"));
    for broken in [
        "",
        "{",
        intent,
        &text.replace("v1beta1", "v2"),
        &text.replace("\"imageRef\"", "\"imageReference\""),
        &text.replace("\"uid\"", "\"clusterUid\""),
    ] {
        assert!(written::read_record(broken).is_err(), "{broken}");
    }
}

#[test]
fn patterns_are_whole_names_or_whole_paths() {
    for good in ["docker.io/library/nginx", "r.example/*", "r.example:5000/team/*", "localhost/a"] {
        assert!(Allowlist::parse(&[good.to_owned()]).is_ok(), "{good}");
    }
    for bad in [
        "",
        "*",
        "/*",
        "nginx",
        "r.example/a:1",
        "r.example/a@sha256:00",
        "r.example/a*",
        "r.*/a",
        " r.example/a",
    ] {
        let problem = Allowlist::parse(&[bad.to_owned()]).expect_err(bad);
        assert!(problem.ends_with(&format!("{bad:?}")), "{problem}");
    }
}

fn any_secret() -> impl Strategy<Value = PullSecret> {
    (0_u8..4, 0_u8..4).prop_map(|(name, hash)| secret(&name.to_string(), &hash.to_string()))
}

proptest! {
    /// Whoever pulled with a secret gets in again with it; whoever shares neither object nor content with any does not.
    #[test]
    fn who_pulled_gets_in_and_nobody_else(
        used in prop::collection::vec(any_secret(), 1..8),
        own in any_secret(),
    ) {
        let mut record = PulledRecord::new("sha256:1", at(1));
        for (second, secret) in (2..).zip(&used) {
            record.add(APP, PullCredentials::of_secret(secret.clone()), at(second));
        }
        let last: BTreeMap<&str, &str> =
            used.iter().map(|secret| (secret.name.as_str(), secret.credential_hash.as_str())).collect();
        let shares = last.iter().any(|(name, hash)| *name == own.name || *hash == own.credential_hash);
        let verdict = access(&Policy::NeverVerifyPreloadedImages, APP, &Known::Record(record.clone()), std::slice::from_ref(&own));
        prop_assert_eq!(matches!(verdict, Access::Found { .. }), shares);
        if let Access::Found { learned: Some(secret) } = verdict {
            prop_assert!(record.add(APP, PullCredentials::of_secret(secret), at(100)), "what is learned is new");
        }
        let again = access(&Policy::NeverVerifyPreloadedImages, APP, &Known::Record(record.clone()), &[own]);
        prop_assert!(!shares || again == Access::Found { learned: None }, "once is enough");
        prop_assert_eq!(written::read_record(&written::record(&record)), Ok(record));
    }

    /// Files of anybody are read or refused.
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,80}") {
        written::read_record(&text).ok();
        written::read_intent(&text).ok();
    }
}
