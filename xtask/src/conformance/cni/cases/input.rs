//! What is on standard input: missing, broken, huge, of unknown versions, with keys that nobody knows.

use anyhow::{Result, ensure};
use serde_json::json;

use super::super::super::case::Case;
use super::super::context::{T, with, without};
use super::super::subject::Kind;
use super::{check, group, ready};

/// The specification's code 6 is for decoding; a value of a wrong type may as well be an invalid configuration.
const DECODE: &[u64] = &[6];
const DECODE_OR_CONFIG: &[u64] = &[6, 7];

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let input = group(kind, "input");
    let errors = group(kind, "errors");
    let mut all = vec![
        check(input, "nothing: code 6", |t| raw(t, "", DECODE)),
        check(input, "no JSON: code 6", |t| raw(t, "cniVersion: 1.0.0", DECODE)),
        check(input, "JSON cut short: code 6", |t| raw(t, "{\"cniVersion\":\"1.0.0\",\"name\":\"x", DECODE)),
        check(input, "JSON with something behind it: code 6", |t| behind(t, " {}")),
        check(input, "a list instead of an object: code 6 or 7", |t| raw(t, "[]", DECODE_OR_CONFIG)),
        check(input, "a string instead of an object: code 6 or 7", |t| raw(t, "\"x\"", DECODE_OR_CONFIG)),
        check(input, "null instead of an object is refused", null),
        check(input, "bytes that are no UTF-8: code 6", not_utf8),
        check(input, "a hundred thousand brackets: code 6, no crash", brackets),
        check(input, "eight megabytes of an unknown key are accepted", large),
        check(input, "sixty megabytes end in an answer", huge),
        check(input, "unknown keys are ignored", unknown_keys),
        check(input, "cniVersion unknown: code 1", |t| field(t, "cniVersion", &json!("99.1.0"), &[1])),
        check(input, "cniVersion no version: code 1", |t| {
            field(t, "cniVersion", &json!("latest"), &[1, 6, 7])
        }),
        check(input, "cniVersion a number: code 6 or 7", |t| field(t, "cniVersion", &json!(1), &[1, 6, 7])),
        check(input, "name missing: code 7", name_missing),
        check(input, "name empty: code 7", |t| field(t, "name", &json!(""), &[7])),
        check(input, "name with a path: code 7", |t| field(t, "name", &json!("../x"), &[7])),
        check(input, "name a number: code 6 or 7", |t| field(t, "name", &json!(5), DECODE_OR_CONFIG)),
        check(errors, "the object carries code, msg and the version asked in", error_version),
        check(errors, "a refused call says so by its exit status", error_status),
    ];
    if kind != Kind::Loopback {
        all.push(check(input, "runtimeConfig a string: code 6 or 7", runtime_config));
    }
    if kind.is_chained() {
        all.push(check(input, "prevResult a string: refused", prev_string));
        all.push(check(input, "prevResult of an unknown version: refused", prev_version));
    }
    all
}

fn raw(t: &T, text: &str, codes: &[u64]) -> Result<()> {
    let (pod, config) = ready(t)?;
    for verb in ["ADD", "DEL"] {
        t.run(&t.call(verb, &pod, &config).raw(text))?.refused_with(codes)?;
    }
    Ok(())
}

fn behind(t: &T, more: &str) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.run(&t.call("ADD", &pod, &config).raw(format!("{config}{more}")))?.refused_with(DECODE)?;
    Ok(())
}

fn null(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.run(&t.call("ADD", &pod, &config).raw("null"))?.refused_somehow()?;
    Ok(())
}

fn not_utf8(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let bytes = [b"{\"cniVersion\":\"1.0.0\",\"name\":\"".as_slice(), &[0xff, 0xfe], b"\"}"].concat();
    t.run(&t.call("ADD", &pod, &config).raw(bytes))?.refused_with(&[6, 7])?;
    Ok(())
}

fn brackets(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.run(&t.call("ADD", &pod, &config).raw("[".repeat(100_000)))?.refused_with(&[6, 7])?;
    Ok(())
}

fn large(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let config = with(&config, "annotation", "x".repeat(8 << 20).into());
    t.add(&pod, &config)?;
    t.del(&pod, &config)
}

fn huge(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let big = with(&config, "annotation", "x".repeat(60 << 20).into());
    let answer = t.ask("ADD", &pod, &big)?;
    if answer.status == Some(0) {
        answer.ok()?;
    } else {
        answer.refused_with(&[5, 6, 7])?;
    }
    t.del(&pod, &config)
}

fn unknown_keys(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let config = with(&config, "org.example/colour", json!({"red": [1, 2, null]}));
    t.add(&pod, &config)?;
    t.del(&pod, &config)
}

fn field(t: &T, key: &str, value: &serde_json::Value, codes: &[u64]) -> Result<()> {
    let (pod, config) = ready(t)?;
    for verb in ["ADD", "DEL"] {
        t.ask(verb, &pod, &with(&config, key, value.clone()))?.refused_with(codes)?;
    }
    Ok(())
}

fn runtime_config(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.ask("ADD", &pod, &with(&config, "runtimeConfig", json!("x")))?.refused_with(DECODE_OR_CONFIG)?;
    Ok(())
}

fn name_missing(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.ask("ADD", &pod, &without(&config, "name"))?.refused_with(&[7])?.names(&["name"])
}

fn prev_string(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    t.ask("ADD", &pod, &with(&config, "prevResult", json!("x")))?.refused_somehow()?;
    Ok(())
}

fn prev_version(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let result = json!({"cniVersion": "99.0.0", "ips": []});
    t.ask("ADD", &pod, &with(&config, "prevResult", result))?.refused_somehow()?;
    Ok(())
}

fn error_version(t: &T) -> Result<()> {
    for version in super::super::context::VERSIONS.into_iter().filter(|version| t.supports(version)) {
        let (pod, config) = super::ready_for(t, version)?;
        let refusal = t.run(&t.call("ADD", &pod, &config).unset("CNI_IFNAME"))?.refused()?;
        ensure!(
            refusal.object["cniVersion"] == version,
            "asked in {version}, the error object is {}",
            refusal.object
        );
    }
    Ok(())
}

fn error_status(t: &T) -> Result<()> {
    let (pod, config) = ready(t)?;
    let answer = t.ask("ADD", &pod, &with(&config, "cniVersion", json!("99.1.0")))?;
    ensure!(answer.status.is_some_and(|status| status != 0), "exit status {:?}", answer.status);
    ensure!(
        !answer.stdout.trim().is_empty(),
        "nothing on standard output; on standard error: {}",
        answer.stderr
    );
    Ok(())
}
