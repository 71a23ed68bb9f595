//! GC: what no valid attachment explains goes, everything else stays.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::super::super::case::{Case, same};
use super::super::context::{Pod, T, with};
use super::super::fake::Fake;
use super::super::subject::Kind;
use super::{check, group, need, ready, ready_for};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let area = group(kind, "GC");
    let mut all = vec![
        check(area, "needs no container, namespace or interface", alone),
        check(area, "with nothing to do, again and again", again),
        check(area, "of version 1.0.0, which has none: code 1", too_old),
        check(area, "with a list that is none: refused", bad_list),
        check(area, "keeps a valid attachment", keeps),
    ];
    if kind.attaches() || kind == Kind::Ipam {
        all.push(check(area, "takes back what no valid attachment explains", takes_back));
        all.push(check(area, "with an empty list takes back everything of the network", everything));
        if kind != Kind::Vxlan {
            all.push(check(area, "leaves other networks alone", other_networks));
        }
    }
    if kind.attaches() {
        all.extend([
            check(area, "takes back attachments whose namespaces are gone", namespaces_gone),
            check(area, "is passed on to the delegate with the list", passed_on),
            check(area, "goes on after the delegate's failure and tells it", goes_on),
        ]);
    }
    all
}

fn alone(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    t.gc(&t.config(), &[])?.ok_silent()
}

fn again(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    (0..3).try_for_each(|_| t.gc(&t.config(), &[])?.ok_silent())
}

fn too_old(t: &T) -> Result<()> {
    need(t, "1.0.0")?;
    t.gc(&t.config_of("1.0.0"), &[])?.refused_with(&[1])?;
    Ok(())
}

fn bad_list(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    let nobody = Pod { id: String::new(), netns: t.dir().to_owned() };
    for list in [json!("all"), json!([5]), json!([{"containerID": 5}])] {
        let config = with(&t.config(), "cni.dev/valid-attachments", list);
        t.ask("GC", &nobody, &config)?.refused_with(&[6, 7])?.names(&["valid-attachments", "attachment"])?;
    }
    Ok(())
}

fn keeps(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    let (pod, config) = ready_for(t, "1.1.0")?;
    let result = t.add(&pod, &config)?;
    t.gc(&t.config(), &[&pod])?.ok_silent()?;
    t.check(&pod, &config, &result)?.ok().context("the valid attachment is damaged")?;
    t.del(&pod, &config)
}

fn takes_back(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    let config = t.config();
    let pods = [t.pod()?, t.pod()?, t.pod()?];
    let results = pods.iter().map(|pod| t.add(pod, &config)).collect::<Result<Vec<_>>>()?;
    t.gc(&config, &[&pods[1]])?.ok_silent()?;
    t.check(&pods[1], &config, &results[1])?.ok().context("the valid attachment is damaged")?;
    if t.subject().kind.attaches() {
        t.gone(|| Ok(t.pairs()?.len() == 1), "not one pair is left")?;
    }
    t.del(&pods[1], &config)?;
    t.addresses_free()
}

fn everything(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    t.add(&t.pod()?, &t.config())?;
    t.gc(&t.config(), &[])?.ok_silent()?;
    if t.subject().kind.attaches() { t.nothing_left() } else { t.addresses_free() }
}

fn other_networks(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    let mut other = t.config();
    other["name"] = json!("conformance2");
    other["ipam"]["ranges"] = json!([[{"subnet": "10.91.1.0/29"}]]);
    let pod = t.pod()?;
    let result = t.add(&pod, &other)?;
    t.gc(&t.config(), &[])?.ok_silent()?;
    t.check(&pod, &other, &result)?.ok().context("the other network's attachment is damaged")?;
    Ok(())
}

fn namespaces_gone(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    for _ in 0..4 {
        let pod = t.pod()?;
        t.add(&pod, &t.config())?;
        cni_plugins_host::netns::remove(&pod.netns)?;
    }
    t.gc(&t.config(), &[])?.ok_silent()?;
    t.nothing_left()
}

fn passed_on(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    let fake = Fake::new(t)?;
    let (pod, _) = ready(t)?;
    t.gc(&fake.config(t), &[&pod])?.ok_silent()?;
    same("calls", fake.calls("GC"), 1)?;
    let wanted = json!([{"containerID": pod.id, "ifname": "eth0"}]);
    same("the list", &fake.input("GC")?["cni.dev/valid-attachments"], &wanted)
}

fn goes_on(t: &T) -> Result<()> {
    need(t, "1.1.0")?;
    let fake = Fake::new(t)?;
    let config = fake.config(t);
    t.add(&t.pod()?, &config)?;
    fake.fails("GC", 11)?;
    t.gc(&config, &[])?.refused_with(&[11])?;
    t.gone(|| Ok(t.pairs()?.is_empty()), "the stale pair is left")?;
    ensure!(fake.calls("GC") == 1, "calls: {:?}", fake.log());
    Ok(())
}
