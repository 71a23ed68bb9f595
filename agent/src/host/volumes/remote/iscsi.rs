//! iSCSI as pure functions: names, arguments of `iscsiadm`, and what its answers mean.
//!
//! Upstream's rules: `pkg/volume/iscsi` of the kubelet. The directory of a disk, and the `iscsi.json` in it, are upstream's too,
//! so that either kubelet undoes what the other did.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A disk of a target.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Target {
    /// Name of the PersistentVolume, or of the pod's volume.
    pub(super) volume: String,
    /// Addresses with ports; the first names the directory.
    pub(super) portals: Vec<String>,
    pub(super) iqn: String,
    pub(super) lun: i32,
    /// The iface record that is used, or copied where there is an initiator name.
    pub(super) interface: String,
    /// `initiatorName`; empty: the node's own.
    pub(super) initiator: String,
    /// Empty: ext4.
    pub(super) fs_type: String,
    pub(super) chap: Chap,
}

/// How to log in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chap {
    pub(super) discovery: bool,
    pub(super) session: bool,
    /// Namespace and name.
    pub(super) secret: Option<(String, String)>,
}

/// What a disk's directory says, in upstream's words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Record {
    pub(super) vol_name: String,
    pub(super) portals: Vec<String>,
    pub(super) iqn: String,
    pub(super) lun: String,
    /// The iface record that was logged in with.
    pub(super) iface: String,
    pub(super) initiator_name: String,
    /// The iface record that the volume names.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) init_iface: String,
}

impl Target {
    /// The iface record to log in with: one of its own where the initiator has a name of its own.
    pub(super) fn login_interface(&self) -> String {
        match self.portals.first() {
            Some(portal) if !self.initiator.is_empty() => format!("{portal}:{}", self.volume),
            _ => self.interface.clone(),
        }
    }

    /// Whether its words can be part of a path and of a command.
    pub(super) fn check(&self) -> Result<(), String> {
        let portal = self.portals.first().map(String::as_str).unwrap_or_default();
        for (field, text) in [
            ("iqn", self.iqn.as_str()),
            ("targetPortal", portal),
            ("iscsiInterface", self.interface.as_str()),
            ("volume name", self.volume.as_str()),
        ] {
            let is_plain = !text.is_empty()
                && !text.starts_with('-')
                && !text.contains('/')
                && !text.contains(char::is_whitespace);
            if !is_plain {
                return Err(format!("iscsi: {field} {text:?} cannot name a target"));
            }
        }
        if self.lun < 0 { Err(format!("iscsi: lun {} is negative", self.lun)) } else { Ok(()) }
    }

    /// Where the node has the disk's file system, below the kubelet's root directory. Upstream writes the iface record that is
    /// logged in with.
    pub(super) fn global_dir(&self, root: &Path) -> PathBuf {
        let portal = self.portals.first().map(String::as_str).unwrap_or_default();
        plugin_dir(root)
            .join(format!("iface-{}", self.login_interface()))
            .join(format!("{portal}-{}-lun-{}", self.iqn, self.lun))
    }

    /// What is written into that directory.
    pub(super) fn record(&self) -> Record {
        Record {
            vol_name: self.volume.clone(),
            portals: self.portals.clone(),
            iqn: self.iqn.clone(),
            lun: self.lun.to_string(),
            iface: self.login_interface(),
            initiator_name: self.initiator.clone(),
            init_iface: self.interface.clone(),
        }
    }
}

/// Where disks of targets are.
pub(super) fn plugin_dir(root: &Path) -> PathBuf {
    root.join("plugins/kubernetes.io/iscsi")
}

/// What comes before the number of the disk, in the name of a directory: the portal and the target.
pub(super) fn target_part(name: &str) -> Option<&str> {
    name.rsplit_once("-lun-").map(|(target, _)| target)
}

/// The link at which udev shows the disk, by the iface's transport. Other transports than `tcp` have the adapter's address
/// before it: the end of the name is what counts then.
pub(super) fn link_name(target: &Target, portal: &str) -> String {
    format!("ip-{portal}-iscsi-{}-lun-{}", target.iqn, target.lun)
}

/// The secret's keys that are settings of the discovery, and of the session.
const DISCOVERY_KEYS: [&str; 4] = [
    "discovery.sendtargets.auth.username",
    "discovery.sendtargets.auth.password",
    "discovery.sendtargets.auth.username_in",
    "discovery.sendtargets.auth.password_in",
];
const SESSION_KEYS: [&str; 4] = [
    "node.session.auth.username",
    "node.session.auth.password",
    "node.session.auth.username_in",
    "node.session.auth.password_in",
];

/// One call of `iscsiadm`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) arguments: Vec<String>,
    /// What failed when it fails, for the event; `None`: it may fail.
    pub(super) problem: Option<String>,
}

fn call(parts: [&[&str]; 2], problem: Option<String>) -> Call {
    Call { arguments: parts.concat().into_iter().map(str::to_owned).collect(), problem }
}

/// Sets the way of logging in and, as far as the secret has them, its keys.
fn chap(
    base: &[&str],
    method: &str,
    keys: [&str; 4],
    what: &str,
    secret: &BTreeMap<String, String>,
) -> Vec<Call> {
    let of_secret = keys.into_iter().filter_map(|key| Some((key, secret.get(key)?.as_str())));
    let values = std::iter::once((method, "CHAP")).chain(of_secret.filter(|(_, value)| !value.is_empty()));
    values
        .map(|(key, value)| {
            let problem = format!("iscsi: failed to update {what} key {key:?}");
            call([base, &["-o", "update", "-n", key, "-v", value]], Some(problem))
        })
        .collect()
}

/// Everything that leads from nothing to a session at a portal. Secrets are in arguments, never in the words of a problem.
pub(super) fn login(target: &Target, portal: &str, secret: &BTreeMap<String, String>) -> Vec<Call> {
    let iface = target.login_interface();
    let discovery = ["-m", "discoverydb", "-t", "sendtargets", "-p", portal, "-I", &iface];
    let node = ["-m", "node", "-p", portal, "-T", &target.iqn, "-I", &iface];
    let mut calls = vec![call([&discovery, &["-o", "new"]], None)];
    if target.chap.discovery {
        let method = "discovery.sendtargets.auth.authmethod";
        calls.extend(chap(&discovery, method, DISCOVERY_KEYS, "discoverydb", secret));
    }
    let problem = format!("iscsi: failed to sendtargets to portal {portal}");
    calls.push(call([&discovery, &["--discover"]], Some(problem)));
    if target.chap.session {
        let method = "node.session.auth.authmethod";
        calls.extend(chap(&node, method, SESSION_KEYS, "node session", secret));
    }
    // Only the one disk is looked for afterwards; others of the target are none of this node's business.
    calls.push(call([&node, &["-o", "update", "-n", "node.session.scan", "-v", "manual"]], None));
    calls.push(call([&node, &["--login"]], Some("iscsi: failed to attach disk".to_owned())));
    // A machine that starts must not wait for a target that is not there.
    calls.push(call([&node, &["-o", "update", "-n", "node.startup", "-v", "manual"]], None));
    calls
}

/// Forgets what a failed login has left in iscsiadm's records.
pub(super) fn forget(target: &Target, portal: &str) -> Vec<Call> {
    let iface = target.login_interface();
    vec![
        call(
            [&["-m", "discoverydb", "-t", "sendtargets", "-p", portal, "-I", &iface], &["-o", "delete"]],
            None,
        ),
        call([&["-m", "node", "-p", portal, "-I", &iface, "-T", &target.iqn], &["-o", "delete"]], None),
    ]
}

/// Ends the sessions of a disk's target.
pub(super) fn logout(record: &Record) -> Vec<Call> {
    let mut calls = Vec::new();
    for portal in &record.portals {
        let node = ["-m", "node", "-p", portal, "-T", &record.iqn, "-I", &record.iface];
        calls.push(call([&node, &["--logout"]], Some(format!("iscsi: failed to log out of {portal}"))));
        calls.push(call([&node, &["-o", "delete"]], None));
    }
    let own = record.portals.first().map(|portal| format!("{portal}:{}", record.vol_name));
    if !record.initiator_name.is_empty() && own.as_ref() == Some(&record.iface) {
        calls.push(call([&["-m", "iface", "-I", &record.iface], &["-o", "delete"]], None));
    }
    calls
}

/// What `iscsiadm -m iface -o show` says of an iface record, without what is empty.
pub(super) fn parse_iface(text: &str) -> BTreeMap<String, String> {
    let settings = text.lines().filter_map(|line| line.trim().split_once(" = "));
    let known = settings.filter(|(key, value)| key.starts_with("iface.") && !value.contains("<empty>"));
    known.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()
}

/// A copy of an iface record under another name and with the initiator's own name.
pub(super) fn clone_iface(name: &str, initiator: &str, settings: &BTreeMap<String, String>) -> Vec<Call> {
    let base = ["-m", "iface", "-I", name];
    let mut settings = settings.clone();
    settings.insert("iface.initiatorname".to_owned(), initiator.to_owned());
    // Neither the name nor what was written by whom can be set.
    settings.retain(|key, _| key != "iface.iscsi_ifacename");
    let mut calls = vec![call([&base, &["-o", "new"]], None)];
    for (key, value) in &settings {
        let problem = format!("iscsi: failed to update iface records key {key:?} of {name:?}");
        calls.push(call([&base, &["-o", "update", "-n", key, "-v", value]], Some(problem)));
    }
    calls
}

/// A session, as `iscsiadm -m session` lists it: `tcp: [1] 10.0.0.1:3260,1 iqn.2026-01.example:disk (non-flash)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Session {
    /// Its number.
    pub(super) id: u32,
    /// Address and port.
    pub(super) portal: String,
    pub(super) iqn: String,
}

/// The sessions of the node.
pub(super) fn parse_sessions(text: &str) -> Vec<Session> {
    text.lines().filter_map(parse_session).collect()
}

fn parse_session(line: &str) -> Option<Session> {
    let (_, rest) = line.split_once('[')?;
    let (id, rest) = rest.split_once(']')?;
    let mut words = rest.split_whitespace();
    let (portal, _group) = words.next()?.rsplit_once(',')?;
    Some(Session { id: id.parse().ok()?, portal: portal.to_owned(), iqn: words.next()?.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target {
        Target {
            volume: "pv".to_owned(),
            portals: vec!["10.0.0.1:3260".to_owned(), "10.0.0.2:3260".to_owned()],
            iqn: "iqn.2026-01.example:disk".to_owned(),
            lun: 7,
            interface: "default".to_owned(),
            ..Target::default()
        }
    }

    fn lines(calls: &[Call]) -> Vec<String> {
        calls.iter().map(|call| call.arguments.join(" ")).collect()
    }

    #[test]
    fn names_are_upstreams() {
        let dir = target().global_dir(Path::new("/k"));
        assert_eq!(
            dir,
            Path::new(
                "/k/plugins/kubernetes.io/iscsi/iface-default/10.0.0.1:3260-iqn.2026-01.example:disk-lun-7"
            )
        );
        let name = dir.file_name().unwrap().to_str().unwrap();
        assert_eq!(target_part(name), Some("10.0.0.1:3260-iqn.2026-01.example:disk"));
        assert_eq!(
            link_name(&target(), "10.0.0.1:3260"),
            "ip-10.0.0.1:3260-iscsi-iqn.2026-01.example:disk-lun-7"
        );
        let own = Target { initiator: "iqn.me".to_owned(), ..target() };
        assert_eq!(own.login_interface(), "10.0.0.1:3260:pv");
        let json = serde_json::to_string(&target().record()).unwrap();
        assert!(json.starts_with(r#"{"VolName":"pv","Portals":["10.0.0.1:3260""#), "{json}");
        let upstreams = r#"{"VolName":"pv","Portals":["p:1"],"Iqn":"iqn.a","Lun":"7","Iface":"default","InitiatorName":"","MetricsProvider":null}"#;
        assert_eq!(serde_json::from_str::<Record>(upstreams).unwrap().lun, "7");
    }

    #[test]
    fn words_that_are_no_names_are_refused() {
        assert_eq!(target().check(), Ok(()));
        for broken in [
            Target { iqn: "../x".to_owned(), ..target() },
            Target { iqn: "-o".to_owned(), ..target() },
            Target { portals: vec!["a b".to_owned()], ..target() },
            Target { lun: -1, ..target() },
        ] {
            assert!(broken.check().is_err(), "{broken:?}");
        }
    }

    #[test]
    fn a_login_sets_what_the_secret_has_before_it_is_tried() {
        let chap = Chap { discovery: true, session: true, secret: None };
        let secret = BTreeMap::from([
            ("node.session.auth.username".to_owned(), "me".to_owned()),
            ("node.session.auth.password".to_owned(), "hush".to_owned()),
            ("discovery.sendtargets.auth.username".to_owned(), "you".to_owned()),
            ("other".to_owned(), "x".to_owned()),
        ]);
        let calls = login(&Target { chap, ..target() }, "10.0.0.2:3260", &secret);
        let db = "-m discoverydb -t sendtargets -p 10.0.0.2:3260 -I default";
        let node = "-m node -p 10.0.0.2:3260 -T iqn.2026-01.example:disk -I default";
        assert_eq!(
            lines(&calls),
            [
                format!("{db} -o new"),
                format!("{db} -o update -n discovery.sendtargets.auth.authmethod -v CHAP"),
                format!("{db} -o update -n discovery.sendtargets.auth.username -v you"),
                format!("{db} --discover"),
                format!("{node} -o update -n node.session.auth.authmethod -v CHAP"),
                format!("{node} -o update -n node.session.auth.username -v me"),
                format!("{node} -o update -n node.session.auth.password -v hush"),
                format!("{node} -o update -n node.session.scan -v manual"),
                format!("{node} --login"),
                format!("{node} -o update -n node.startup -v manual"),
            ]
        );
        assert!(calls.iter().all(|call| !call.problem.as_deref().unwrap_or_default().contains("hush")));
        assert_eq!(login(&target(), "p:1", &secret).len(), 5, "without CHAP the secret is not used");
    }

    #[test]
    fn a_logout_forgets_only_the_iface_that_was_made_for_it() {
        let delete = |target: &Target| {
            let calls = lines(&logout(&target.record()));
            calls.iter().any(|line| line.starts_with("-m iface"))
        };
        assert!(!delete(&target()));
        assert!(delete(&Target { initiator: "iqn.me".to_owned(), ..target() }));
        assert_eq!(logout(&target().record()).len(), 4, "both portals");
    }

    #[test]
    fn iscsiadm_is_understood() {
        let sessions = parse_sessions(
            "tcp: [1] 10.0.0.1:3260,1 iqn.2026-01.example:disk (non-flash)\n\
             tcp: [12] [fd00::1]:3260,1 iqn.b\niscsiadm: No active sessions.\n",
        );
        let found: Vec<_> =
            sessions.iter().map(|one| (one.id, one.portal.as_str(), one.iqn.as_str())).collect();
        assert_eq!(
            found,
            [(1, "10.0.0.1:3260", "iqn.2026-01.example:disk"), (12, "[fd00::1]:3260", "iqn.b")]
        );
        let iface = parse_iface(
            "# BEGIN RECORD 2.1.8\niface.iscsi_ifacename = default\niface.transport_name = tcp\n\
             iface.initiatorname = <empty>\n# END RECORD\n",
        );
        assert_eq!(iface["iface.transport_name"], "tcp");
        assert_eq!(iface.len(), 2);
        let calls = lines(&clone_iface("p:1:pv", "iqn.me", &iface));
        assert_eq!(calls[0], "-m iface -I p:1:pv -o new");
        assert!(calls.contains(&"-m iface -I p:1:pv -o update -n iface.initiatorname -v iqn.me".to_owned()));
        assert!(!calls.iter().any(|line| line.contains("iscsi_ifacename")));
    }
}
