//! An IPAM plugin, called as a main plugin calls it.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::super::case::{Case, same};
use super::super::context::{Pod, T, with};
use super::super::subject::Kind;
use super::{check, group};

pub(super) fn cases(kind: Kind) -> Vec<Case<T>> {
    let add = group(kind, "ADD");
    let refused = group(kind, "ADD refused");
    vec![
        check(add, "gives an address of the subnet with gateway and routes, and no interfaces", plain),
        check(add, "different containers get different addresses", different),
        check(add, "different interfaces of a container get different addresses", interfaces),
        check(add, "one address of each set", sets),
        check(add, "several subnets in a set: the next when the first is full", next_subnet),
        check(add, "only from rangeStart to rangeEnd", range),
        check(add, "never the gateway's, nor network and broadcast", never),
        check(add, "the configured gateway is told", gateway),
        check(add, "an address asked for by CNI_ARGS", by_args),
        check(add, "an address asked for by the capability ips", by_capability),
        check(add, "ranges given by the capability ipRanges", |t| by_ranges(t, "subnet")),
        check(add, "the same with capitals, as containerd writes them", |t| by_ranges(t, "Subnet")),
        check(add, "IPv6 subnets of 64 bits", ipv6),
        check(add, "an address given back is free again", freed),
        check(add, "thirty at once get different addresses", thirty),
        check(add, "networks do not share addresses", networks),
        check(refused, "exhausted: an error that names the range", exhausted),
        check(refused, "all or nothing when the second set is full", all_or_nothing),
        check(refused, "an address that is taken", taken),
        check(refused, "an address of no range", outside),
        check(refused, "an address that is none", no_address),
        check(refused, "no ranges", |t| ranges(t, &json!([]), &["range"])),
        check(refused, "a subnet that is none", |t| {
            subnet(t, &json!({"subnet": "10.91.0.0"}), &["subnet", "10.91.0.0", "CIDR"])
        }),
        check(refused, "a subnet with one address", |t| {
            subnet(t, &json!({"subnet": "10.91.0.0/32"}), &["10.91.0.0/32", "small"])
        }),
        check(refused, "a subnet with two addresses", |t| {
            subnet(t, &json!({"subnet": "10.91.0.0/31"}), &["10.91.0.0/31", "small"])
        }),
        check(refused, "rangeStart outside the subnet", |t| {
            subnet(t, &json!({"subnet": "10.91.0.0/29", "rangeStart": "10.99.0.1"}), &["10.99.0.1"])
        }),
        check(refused, "rangeEnd outside the subnet", |t| {
            subnet(t, &json!({"subnet": "10.91.0.0/29", "rangeEnd": "10.99.0.1"}), &["10.99.0.1"])
        }),
        check(refused, "rangeStart behind rangeEnd", |t| {
            let range = json!({"subnet": "10.91.0.0/29", "rangeStart": "10.91.0.5", "rangeEnd": "10.91.0.3"});
            subnet(t, &range, &["10.91.0.5", "10.91.0.3"])
        }),
        check(refused, "a gateway outside the subnet", |t| {
            subnet(t, &json!({"subnet": "10.91.0.0/29", "gateway": "10.99.0.1"}), &["gateway", "10.99.0.1"])
        }),
        check(refused, "overlapping ranges in a set", |t| {
            let set = json!([[{"subnet": "10.91.0.0/29"}, {"subnet": "10.91.0.0/30"}]]);
            ranges(t, &set, &["overlap"])
        }),
        check(refused, "overlapping sets", |t| {
            ranges(t, &json!([[{"subnet": "10.91.0.0/29"}], [{"subnet": "10.91.0.0/30"}]]), &["overlap"])
        }),
        check(refused, "both families in a set", |t| {
            ranges(t, &json!([[{"subnet": "10.91.0.0/29"}, {"subnet": "fd91::/120"}]]), &["famil", "mix"])
        }),
        check(refused, "ipam missing", ipam_missing),
    ]
}

fn with_ranges(t: &T, ranges: &Value) -> Value {
    let mut config = t.config();
    config["ipam"]["ranges"] = ranges.clone();
    config
}

fn addresses(result: &Value) -> Result<Vec<String>> {
    let all = result["ips"].as_array().with_context(|| format!("no ips in {result}"))?;
    Ok(all.iter().filter_map(|ip| ip["address"].as_str().map(str::to_owned)).collect())
}

/// ADD of a new container; its addresses.
fn take(t: &T, config: &Value) -> Result<Vec<String>> {
    addresses(&t.add(&t.pod()?, config)?)
}

fn plain(t: &T) -> Result<()> {
    let result = t.add(&t.pod()?, &t.config())?;
    ensure!(result["interfaces"].as_array().is_none_or(Vec::is_empty), "interfaces in {result}");
    let given = addresses(&result)?;
    ensure!(given.len() == 1 && given[0].starts_with("10.91.0.") && given[0].ends_with("/29"), "{given:?}");
    same("the gateway", result["ips"][0]["gateway"].as_str(), Some("10.91.0.1"))?;
    same("the routes", result["routes"][0]["dst"].as_str(), Some("0.0.0.0/0"))
}

fn different(t: &T) -> Result<()> {
    let (one, two) = (take(t, &t.config())?, take(t, &t.config())?);
    ensure!(one != two, "both have {one:?}");
    Ok(())
}

fn interfaces(t: &T) -> Result<()> {
    let pod = t.pod()?;
    let one = addresses(&t.add(&pod, &t.config())?)?;
    let two = addresses(&t.run(&t.call("ADD", &pod, &t.config()).set("CNI_IFNAME", "eth1"))?.ok()?)?;
    ensure!(one != two, "both have {one:?}");
    t.run(&t.call("DEL", &pod, &t.config()).set("CNI_IFNAME", "eth1"))?.ok()?;
    let three = take(t, &t.config())?;
    ensure!(three != one, "the DEL of eth1 gave back eth0's address");
    Ok(())
}

fn sets(t: &T) -> Result<()> {
    let config = with_ranges(t, &json!([[{"subnet": "10.91.0.0/29"}], [{"subnet": "fd91::/120"}]]));
    let given = take(t, &config)?;
    ensure!(given.len() == 2 && given[0].contains('.') && given[1].contains(':'), "{given:?}");
    Ok(())
}

fn next_subnet(t: &T) -> Result<()> {
    let config = with_ranges(t, &json!([[{"subnet": "10.91.0.0/30"}, {"subnet": "10.91.1.0/30"}]]));
    let mut given = [take(t, &config)?, take(t, &config)?].concat();
    given.sort();
    same("the addresses", given, vec!["10.91.0.2/30".to_owned(), "10.91.1.2/30".to_owned()])
}

fn range(t: &T) -> Result<()> {
    let range = json!({"subnet": "10.91.0.0/24", "rangeStart": "10.91.0.50", "rangeEnd": "10.91.0.51"});
    let config = with_ranges(t, &json!([[range]]));
    let mut given = [take(t, &config)?, take(t, &config)?].concat();
    given.sort();
    same("the addresses", given, vec!["10.91.0.50/24".to_owned(), "10.91.0.51/24".to_owned()])?;
    t.ask("ADD", &t.pod()?, &config)?.refused_somehow()?;
    Ok(())
}

fn never(t: &T) -> Result<()> {
    let mut given = Vec::new();
    for _ in 0..5 {
        given.extend(take(t, &t.config())?);
    }
    given.sort();
    let wanted: Vec<String> = (2..7).map(|last| format!("10.91.0.{last}/29")).collect();
    same("the addresses", given, wanted)
}

fn gateway(t: &T) -> Result<()> {
    let config = with_ranges(t, &json!([[{"subnet": "10.91.0.0/30", "gateway": "10.91.0.2"}]]));
    let result = t.add(&t.pod()?, &config)?;
    same("the gateway", result["ips"][0]["gateway"].as_str(), Some("10.91.0.2"))?;
    same("the address", result["ips"][0]["address"].as_str(), Some("10.91.0.1/30"))
}

fn by_args(t: &T) -> Result<()> {
    let call = t.call("ADD", &t.pod()?, &t.config()).set("CNI_ARGS", "IP=10.91.0.5");
    same("the address", addresses(&t.run(&call)?.ok()?)?, vec!["10.91.0.5/29".to_owned()])
}

fn by_capability(t: &T) -> Result<()> {
    for (asked, given) in [("10.91.0.5", "10.91.0.5/29"), ("10.91.0.6/29", "10.91.0.6/29")] {
        let config = with(&t.config(), "runtimeConfig", json!({"ips": [asked]}));
        same("the address", take(t, &config)?, vec![given.to_owned()])?;
    }
    Ok(())
}

fn by_ranges(t: &T, key: &str) -> Result<()> {
    let mut config = with(&t.config(), "runtimeConfig", json!({"ipRanges": [[{key: "10.95.0.0/30"}]]}));
    if let Some(ipam) = config["ipam"].as_object_mut() {
        ipam.remove("ranges");
    }
    same("the address", take(t, &config)?, vec!["10.95.0.2/30".to_owned()])
}

fn ipv6(t: &T) -> Result<()> {
    let given = take(t, &with_ranges(t, &json!([[{"subnet": "fd91:2::/64"}]])))?;
    let text = given.first().context("no address")?.split('/').next().unwrap_or_default().to_owned();
    ensure!(text.parse::<IpAddr>()?.is_ipv6() && given[0].ends_with("/64"), "{given:?}");
    Ok(())
}

fn freed(t: &T) -> Result<()> {
    for _ in 0..12 {
        let pod = t.pod()?;
        t.add(&pod, &t.config())?;
        t.del(&pod, &t.config())?;
    }
    t.addresses_free()
}

fn thirty(t: &T) -> Result<()> {
    let config = with_ranges(t, &json!([[{"subnet": "10.91.0.0/24"}]]));
    let pods: Vec<Pod> =
        (0..30).map(|number| Pod { id: format!("many-{number}"), netns: t.host().to_owned() }).collect();
    let results: Vec<Result<Value>> = std::thread::scope(|scope| {
        let calls: Vec<_> = pods.iter().map(|pod| scope.spawn(|| t.add(pod, &config))).collect();
        calls.into_iter().map(|call| call.join().unwrap_or_else(|_| anyhow::bail!("a panic"))).collect()
    });
    let mut given = Vec::new();
    for result in results {
        given.extend(addresses(&result?)?);
    }
    given.sort();
    given.dedup();
    same("different addresses", given.len(), 30)
}

fn networks(t: &T) -> Result<()> {
    let config = with_ranges(t, &json!([[{"subnet": "10.91.0.0/30"}]]));
    take(t, &config)?;
    take(t, &with(&config, "name", json!("conformance2"))).context("another network has its own")?;
    Ok(())
}

fn exhausted(t: &T) -> Result<()> {
    for _ in 0..5 {
        take(t, &t.config())?;
    }
    t.ask("ADD", &t.pod()?, &t.config())?.refused_somehow()?.names(&["10.91.0."])
}

fn all_or_nothing(t: &T) -> Result<()> {
    let config = with_ranges(t, &json!([[{"subnet": "10.91.0.0/29"}], [{"subnet": "10.91.1.0/30"}]]));
    let first = t.pod()?;
    t.add(&first, &config)?;
    t.ask("ADD", &t.pod()?, &config)?.refused_somehow()?;
    t.del(&first, &config)?;
    t.addresses_free()
}

fn taken(t: &T) -> Result<()> {
    let args = |pod: &Pod| t.call("ADD", pod, &t.config()).set("CNI_ARGS", "IP=10.91.0.5");
    t.run(&args(&t.pod()?))?.ok()?;
    t.run(&args(&t.pod()?))?.refused_somehow()?.names(&["10.91.0.5"])
}

fn outside(t: &T) -> Result<()> {
    let call = t.call("ADD", &t.pod()?, &t.config()).set("CNI_ARGS", "IP=10.77.0.5");
    t.run(&call)?.refused_somehow()?.names(&["10.77.0.5"])?;
    t.addresses_free()
}

fn no_address(t: &T) -> Result<()> {
    let call = t.call("ADD", &t.pod()?, &t.config()).set("CNI_ARGS", "IP=ten");
    t.run(&call)?.refused_somehow()?.names(&["ten", "IP"])?;
    t.addresses_free()
}

fn ranges(t: &T, ranges: &Value, words: &[&str]) -> Result<()> {
    t.ask("ADD", &t.pod()?, &with_ranges(t, ranges))?.refused_somehow()?.names(words)
}

fn subnet(t: &T, range: &Value, words: &[&str]) -> Result<()> {
    ranges(t, &json!([[range]]), words)
}

fn ipam_missing(t: &T) -> Result<()> {
    t.ask("ADD", &t.pod()?, &super::super::context::without(&t.config(), "ipam"))?
        .refused_somehow()?
        .names(&["ipam", "range"])
}
