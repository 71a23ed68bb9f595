//! kill -9 at any point of ADD and DEL, and reboots in between: nothing is leaked.
//!
//! A chain of bridge, ipam, bandwidth, host ports and masquerade is run as a runtime runs it; one of its calls is killed
//! after a random time, then the runtime's usual clean-up follows: DEL through the chain, or GC. `KEELSON_CNI_ROUNDS`
//! sets the number of rounds (1000 for the whole test), `KEELSON_CNI_SEED` repeats a run.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod ground;

use std::{
    collections::BTreeMap,
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use ground::{Ground, Pod, seen, wait_for, with_result};
use serde_json::{Value, json};

/// Rounds when nobody says otherwise: what a busy machine does within a minute.
const ROUNDS: u32 = 100;
/// Rounds from one reboot to the next.
const UP_TIME: u32 = 50;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

fn chain(ground: &Ground, host_port: u16) -> Vec<Value> {
    let ports = json!([
        {"hostPort": host_port, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": host_port, "containerPort": 80, "protocol": "udp"},
    ]);
    let rates = json!({"ingressRate": 8_000_000, "ingressBurst": 8_000_000, "egressRate": 8_000_000, "egressBurst": 8_000_000});
    vec![
        ground.bridge(),
        ground.plugin("keelson-bandwidth", &rates),
        ground.plugin("keelson-portmap", &json!({"runtimeConfig": {"portMappings": ports}})),
        ground.plugin("keelson-masquerade", &json!({"ipMasqExcept": ["10.0.0.0/8"]})),
    ]
}

/// What an attachment of [`chain`] is, and no more.
fn assert_only(ground: &Ground, pods: usize, why: &str) {
    wait_for(&format!("{pods} pairs, {why}; there are {:?}", ground.pairs()), || {
        ground.pairs().len() == pods
    });
    assert_eq!(ground.leases().len(), pods, "{why}: {:?}", ground.leases());
    let wanted: BTreeMap<String, usize> = if pods == 0 {
        BTreeMap::new()
    } else {
        [
            ("map4", 2 * pods),
            ("map6", 2 * pods),
            ("ports", 2 * pods),
            ("pod_links", 1),
            ("masq4", pods),
            ("masq6", pods),
        ]
        .into_iter()
        .map(|(name, count)| (name.to_owned(), count))
        .collect()
    };
    assert_eq!(ground.elements(), wanted, "{why}");
    let ours = |kind: &str| ground.records().iter().filter(|path| path.contains(kind)).count();
    assert_eq!(ours("/portmap/"), pods, "{why}: {:?}", ground.records());
    let links = ground.inside(&ground.host, "ip -o link show type ifb");
    assert!(links.lines().count() <= pods, "{why}: {links}");
}

/// Runs a call and kills it after `delay`, unless it has ended by then.
fn cut(ground: &Ground, config: &Value, verb: &str, pod: &Pod, delay: Duration) -> Option<Value> {
    let mut child = ground.start(config, verb, Some(pod));
    let end = Instant::now() + delay;
    while Instant::now() < end {
        thread::yield_now();
    }
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap_or_default())
}

#[test]
fn nothing_is_leaked_by_kill_9_at_any_point_nor_by_reboots() {
    let rounds = std::env::var("KEELSON_CNI_ROUNDS").ok().map_or(ROUNDS, |text| text.parse().unwrap());
    let seed = std::env::var("KEELSON_CNI_SEED")
        .ok()
        .map_or(u64::from(std::process::id()), |text| text.parse().unwrap());
    eprintln!("{rounds} rounds, KEELSON_CNI_SEED={seed}");
    let mut random = Random(seed);
    let mut ground = Ground::new();
    let mut survivor = ground.pod("survivor");
    ground.add(&chain(&ground, 9000), &survivor);
    let spans = measure(&ground);
    let mut killed = 0;
    for round in 0..rounds {
        if round > 0 && round.is_multiple_of(UP_TIME) {
            survivor = reboot(&mut ground, round);
        }
        let pod = ground.pod(&format!("c{round}"));
        let chain = chain(&ground, 8000);
        // Which call is cut: one of ADD's, or one of DEL's after a whole ADD.
        let at = usize::try_from(random.below(chain.len() as u64)).unwrap();
        let in_add = random.below(2) == 0;
        let span = spans[usize::from(!in_add)][at].as_micros();
        let delay = Duration::from_micros(random.below(u64::try_from(span).unwrap().max(1)));
        let mut result = Value::Null;
        if in_add {
            for (index, plugin) in chain.iter().enumerate().take(at + 1) {
                let config = with_result(plugin, &result);
                if index < at {
                    result = ground.ask(&config, "ADD", Some(&pod)).unwrap();
                } else if cut(&ground, &config, "ADD", &pod, delay).is_none() {
                    killed += 1;
                }
            }
        } else {
            ground.add(&chain, &pod);
            for (index, plugin) in chain.iter().enumerate().rev() {
                if index > at {
                    ground.ask(plugin, "DEL", Some(&pod)).unwrap();
                } else if index == at && cut(&ground, plugin, "DEL", &pod, delay).is_none() {
                    killed += 1;
                }
            }
        }
        let by_gc = random.below(3) == 0;
        if by_gc {
            ground.gc(&chain, &[&survivor]);
        } else {
            ground.del(&chain, &pod);
        }
        let why = format!(
            "round {round}: {} of {} cut, then {}",
            if in_add { "ADD" } else { "DEL" },
            chain[at]["type"],
            if by_gc { "GC" } else { "DEL" }
        );
        assert_only(&ground, 1, &why);
        cni_plugins_host::netns::remove(&pod.netns).unwrap();
    }
    eprintln!("{killed} calls were killed, the others had ended");
    assert!(killed * 20 > rounds, "only {killed} of {rounds} calls were hit");
    seen(&ground.host, &survivor.netns, 80, "127.0.0.1:9000".parse().unwrap());
    ground.del(&chain(&ground, 9000), &survivor);
    assert_only(&ground, 0, "at the end");
}

/// How long each call of a chain takes at least, for ADD and for DEL: the span in which killing it hits.
fn measure(ground: &Ground) -> [Vec<Duration>; 2] {
    let pod = ground.pod("measured");
    let chain = chain(ground, 8000);
    let mut least = [vec![Duration::MAX; chain.len()], vec![Duration::MAX; chain.len()]];
    let mut note = |which: usize, index: usize, begun: Instant| {
        least[which][index] = least[which][index].min(begun.elapsed());
    };
    for _ in 0..3 {
        let mut result = Value::Null;
        for (index, plugin) in chain.iter().enumerate() {
            let begun = Instant::now();
            result = ground.ask(&with_result(plugin, &result), "ADD", Some(&pod)).unwrap();
            note(0, index, begun);
        }
        for (index, plugin) in chain.iter().enumerate().rev() {
            let begun = Instant::now();
            ground.ask(plugin, "DEL", Some(&pod)).unwrap();
            note(1, index, begun);
        }
        assert_only(ground, 1, "after the measured pod");
    }
    least
}

/// Everything of the kernel goes, the disk stays, and the boot id is another: the first ADD finds every address free.
fn reboot(ground: &mut Ground, number: u32) -> Pod {
    // Pods that were attached when the power went.
    for index in 0..3 {
        let pod = ground.pod(&format!("lost{number}-{index}"));
        ground.add(&chain(ground, 7000 + index), &pod);
    }
    ground.reboot(number);
    // `/run` is empty after a boot.
    fs::remove_dir_all(ground.dir().join("run")).unwrap();
    let boot_id = ground.dir().join("boot_id");
    fs::write(&boot_id, format!("00000000-0000-4000-8000-{number:012}\n")).unwrap();
    let full: Vec<Pod> = (0..5).map(|index| ground.pod(&format!("full{number}-{index}"))).collect();
    let ipam = {
        let mut config = ground.bridge();
        config["type"] = json!("keelson-ipam");
        config
    };
    for pod in &full {
        let added = booted(ground, &boot_id, &ipam, "ADD", pod);
        assert!(added.is_ok(), "an address of before the reboot is held: {added:?}; {:?}", ground.leases());
    }
    for pod in &full {
        booted(ground, &boot_id, &ipam, "DEL", pod).unwrap();
    }
    // Back to the machine's own boot id, which is another reboot for the plugins.
    let survivor = ground.pod(&format!("survivor{number}"));
    ground.add(&chain(ground, 9000), &survivor);
    assert_only(ground, 1, &format!("after the reboot before round {number}"));
    survivor
}

/// A call that sees another boot id.
fn booted(
    ground: &Ground,
    boot_id: &std::path::Path,
    config: &Value,
    verb: &str,
    pod: &Pod,
) -> Result<Value, String> {
    use std::io::Write;
    let plain = ground.command(config["type"].as_str().unwrap(), verb, Some(pod));
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c", "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\""])
        .arg(boot_id)
        .arg(plain.get_program())
        .args(plain.get_args())
        .envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() { Ok(serde_json::from_str(&text).unwrap_or_default()) } else { Err(text) }
}
