//! STATUS: silent when ADD could work; 50 or 51 when not.

use anyhow::Result;
use serde_json::json;

use super::super::super::case::{Case, same};
use super::super::context::{Pod, T};
use super::super::fake::Fake;
use super::super::subject::Kind;
use super::{check, group, need};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let area = group(kind, "STATUS");
    let mut all = vec![
        check(area, "is silent when all is well", fine),
        check(area, "of version 1.0.0, which has none: code 1", too_old),
    ];
    if kind.attaches() || kind == Kind::Ipam {
        all.push(check(area, "addresses exhausted: code 50", exhausted));
    }
    if kind.attaches() {
        all.extend([
            check(area, "is passed on to the delegate, whose code 50 comes back", |t| delegate(t, 50)),
            check(area, "the delegate's code 51 comes back", |t| delegate(t, 51)),
            check(area, "the IPAM executable is missing: an error", missing),
        ]);
    }
    all
}

fn ask(t: &T, config: &serde_json::Value) -> Result<super::super::answer::Answer> {
    t.ask("STATUS", &Pod { id: String::new(), netns: t.dir().to_owned() }, config)
}

fn fine(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    ask(t, &t.config())?.ok_silent()
}

fn too_old(t: &T) -> Result<()> {
    need(t, "1.0.0")?;
    ask(t, &t.config_of("1.0.0"))?.refused_with(&[1])?;
    Ok(())
}

fn exhausted(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    for _ in 0..5 {
        t.add(&t.pod()?, &t.config())?;
    }
    ask(t, &t.config())?.refused_with(&[50])?.names(&["address"])
}

fn delegate(t: &T, code: u64) -> Result<()> {
    need(t, "1.1.0")?;
    let fake = Fake::new(t)?;
    ask(t, &fake.config(t))?.ok_silent()?;
    same("calls", fake.calls("STATUS"), 1)?;
    fake.fails("STATUS", code)?;
    ask(t, &fake.config(t))?.refused_with(&[code])?;
    Ok(())
}

fn missing(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    let mut config = t.config();
    config["ipam"]["type"] = json!("ipam-that-is-not-there");
    ask(t, &config)?.refused_somehow()?.names(&["ipam-that-is-not-there"])
}
