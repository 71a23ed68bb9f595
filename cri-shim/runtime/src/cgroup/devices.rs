//! Which devices a container may use: a list for version 1, a BPF program for version 2.

use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use super::Paths;
use super::dbus::Value;
use super::properties::Property;
use crate::error::Error;
use crate::host::bpf::{self, Insn};

/// One rule; `None` stands for every number.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "independent kinds of access")]
pub(crate) struct Rule {
    allow: bool,
    /// `b` or `c`.
    kind: char,
    major: Option<u32>,
    minor: Option<u32>,
    read: bool,
    write: bool,
    mknod: bool,
}

/// What holds for all devices, and the exceptions, of which the last that fits counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    allow_by_default: bool,
    exceptions: Vec<Rule>,
}

/// What every container may use, as other runtimes have it: nodes of any kind may be made; memory devices, terminals
/// and tun may be used.
const DEFAULTS: &[(char, Option<u32>, Option<u32>, &str)] = &[
    ('c', None, None, "m"),
    ('b', None, None, "m"),
    ('c', Some(1), Some(3), "rwm"),
    ('c', Some(1), Some(8), "rwm"),
    ('c', Some(1), Some(7), "rwm"),
    ('c', Some(5), Some(0), "rwm"),
    ('c', Some(1), Some(5), "rwm"),
    ('c', Some(1), Some(9), "rwm"),
    ('c', Some(136), None, "rwm"),
    ('c', Some(5), Some(2), "rwm"),
    ('c', Some(10), Some(200), "rwm"),
];

/// Puts the rules into force.
pub(crate) fn set(paths: &Paths, rules: &[LinuxDeviceCgroup]) -> Result<(), Error> {
    let rules = Rules::new(rules)?;
    if let Some(directory) = paths.v1.get("devices") {
        return rules.write_v1(directory);
    }
    match &paths.unified {
        // Nothing is forbidden.
        _ if rules.allow_by_default && rules.exceptions.is_empty() => Ok(()),
        Some(directory) => bpf::attach_device_filter(directory, &rules.program()),
        None => Ok(()),
    }
}

/// The rules as properties of a unit.
pub(crate) fn properties(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Property>, Error> {
    let rules = Rules::new(rules)?;
    if rules.allow_by_default {
        return Ok(Vec::new());
    }
    let drivers = std::fs::read_to_string("/proc/devices").unwrap_or_default();
    let allowed = rules.exceptions.iter().enumerate().filter(|(at, rule)| {
        let later = rules.exceptions.iter().skip(at + 1);
        rule.allow && !later.filter(|later| !later.allow).any(|later| later.covers(rule))
    });
    let list = allowed.filter_map(|(_, rule)| Some((rule.unit_name(&drivers)?, rule.access())));
    Ok(vec![
        ("DevicePolicy", Value::Text("strict".to_owned())),
        ("DeviceAllow", Value::Pairs(list.collect())),
    ])
}

impl Rules {
    /// The specification's rules, and after them what every container may use.
    pub(crate) fn new(list: &[LinuxDeviceCgroup]) -> Result<Self, Error> {
        let mut rules = Self::default();
        for (at, rule) in list.iter().enumerate() {
            rules.add(rule, &format!("linux.resources.devices[{at}]"))?;
        }
        if !rules.allow_by_default {
            rules.exceptions.extend(DEFAULTS.iter().map(|(kind, major, minor, access)| Rule {
                allow: true,
                kind: *kind,
                major: *major,
                minor: *minor,
                read: access.contains('r'),
                write: access.contains('w'),
                mknod: access.contains('m'),
            }));
        }
        Ok(rules)
    }

    fn add(&mut self, rule: &LinuxDeviceCgroup, field: &str) -> Result<(), Error> {
        let access = rule.access().as_deref().filter(|access| !access.is_empty()).unwrap_or("rwm");
        if let Some(odd) = access.chars().find(|letter| !"rwm".contains(*letter)) {
            return Err(Error::spec(format!("{field}.access"), format!("{odd:?} is not r, w or m")));
        }
        let kinds: &[char] = match rule.typ() {
            None | Some(LinuxDeviceType::A) => {
                // A rule for all devices takes the place of all before it, whatever else it says.
                *self = Self { allow_by_default: rule.allow(), exceptions: Vec::new() };
                return Ok(());
            }
            Some(LinuxDeviceType::B) => &['b'],
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => &['c'],
            Some(LinuxDeviceType::P) => {
                return Err(Error::spec(format!("{field}.type"), "FIFOs are not devices"));
            }
        };
        let number = |value: Option<i64>, name: &str| match value {
            None | Some(-1) => Ok(None),
            Some(value) => u32::try_from(value)
                .map(Some)
                .map_err(|error| Error::spec(format!("{field}.{name}"), error.to_string())),
        };
        for kind in kinds {
            self.exceptions.push(Rule {
                allow: rule.allow(),
                kind: *kind,
                major: number(rule.major(), "major")?,
                minor: number(rule.minor(), "minor")?,
                read: access.contains('r'),
                write: access.contains('w'),
                mknod: access.contains('m'),
            });
        }
        Ok(())
    }

    fn write_v1(&self, directory: &Path) -> Result<(), Error> {
        let put = |allow: bool, value: &str| -> Result<(), Error> {
            let file = directory.join(if allow { "devices.allow" } else { "devices.deny" });
            std::fs::write(&file, value).map_err(|error: io::Error| {
                Error::step(format!("write {value:?} to {}", file.display()))(error)
            })
        };
        put(self.allow_by_default, "a")?;
        for rule in &self.exceptions {
            put(rule.allow, &rule.line())?;
        }
        Ok(())
    }

    /// The same as a program: 1 allows, 0 forbids.
    pub(crate) fn program(&self) -> Vec<Insn> {
        let mut program = bpf::device_prologue();
        // The last rule that fits counts, so the last is asked first.
        for rule in self.exceptions.iter().rev() {
            let mut access = 0;
            for (bit, given) in [(bpf::MKNOD, rule.mknod), (bpf::READ, rule.read), (bpf::WRITE, rule.write)] {
                access |= if given { bit } else { 0 };
            }
            let kind = if rule.kind == 'b' { bpf::BLOCK } else { bpf::CHAR };
            bpf::device_rule(&mut program, rule.allow, kind, rule.major, rule.minor, access);
        }
        bpf::device_end(&mut program, self.allow_by_default);
        program
    }
}

impl Rule {
    /// As the files of version 1 take it.
    fn line(&self) -> String {
        let number = |value: Option<u32>| value.map_or("*".to_owned(), |value| value.to_string());
        format!("{} {}:{} {}", self.kind, number(self.major), number(self.minor), self.access())
    }

    fn access(&self) -> String {
        let letters = [('r', self.read), ('w', self.write), ('m', self.mknod)];
        letters.into_iter().filter(|(_, given)| *given).map(|(letter, _)| letter).collect()
    }

    /// Whether it is about every device that another is about.
    fn covers(&self, other: &Self) -> bool {
        let number = |own: Option<u32>, other: Option<u32>| own.is_none() || own == other;
        self.kind == other.kind && number(self.major, other.major) && number(self.minor, other.minor)
    }

    /// The name that systemd has for such devices; none where it has none. `drivers` is `/proc/devices`.
    fn unit_name(&self, drivers: &str) -> Option<String> {
        let class = if self.kind == 'b' { "block" } else { "char" };
        match (self.major, self.minor) {
            (Some(major), Some(minor)) => Some(format!("/dev/{class}/{major}:{minor}")),
            (Some(major), None) => driver(drivers, class, major).map(|name| format!("{class}-{name}")),
            (None, None) => Some(format!("{class}-*")),
            (None, Some(_)) => None,
        }
    }
}

/// The name of a device number in `/proc/devices`.
fn driver<'a>(drivers: &'a str, class: &str, major: u32) -> Option<&'a str> {
    let title = if class == "block" { "Block devices:" } else { "Character devices:" };
    let lines = drivers.lines().skip_while(|line| *line != title).skip(1);
    let mut lines = lines.take_while(|line| !line.is_empty()).filter_map(|line| line.trim().split_once(' '));
    lines.find(|(number, _)| number.parse() == Ok(major)).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;
    use proptest::prelude::*;

    use super::*;

    fn rule(allow: bool, kind: LinuxDeviceType, major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
        LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(kind)
            .major(major)
            .minor(minor)
            .access(access)
            .build()
            .unwrap()
    }

    fn deny_all() -> LinuxDeviceCgroup {
        LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build().unwrap()
    }

    #[test]
    fn the_usual_container() {
        let rules = Rules::new(&[deny_all(), rule(true, LinuxDeviceType::C, 10, 229, "rw")]).unwrap();
        assert!(!rules.allow_by_default);
        let lines: Vec<String> = rules.exceptions.iter().map(Rule::line).collect();
        assert_eq!(&lines[..3], ["c 10:229 rw", "c *:* m", "b *:* m"]);
        assert!(lines.contains(&"c 136:* rwm".to_owned()));
    }

    #[test]
    fn a_privileged_one_may_all_and_bad_rules_are_named() {
        let all = LinuxDeviceCgroupBuilder::default().allow(true).access("rwm").build().unwrap();
        assert_eq!(
            Rules::new(&[deny_all(), all]).unwrap(),
            Rules { allow_by_default: true, exceptions: Vec::new() }
        );
        let error = Rules::new(&[rule(true, LinuxDeviceType::C, 1, 1, "rx")]).unwrap_err();
        assert_eq!(error.to_string(), "linux.resources.devices[0].access: 'x' is not r, w or m");
    }

    #[test]
    fn devices_as_systemd_names_them() {
        let drivers = "Character devices:\n  1 mem\n136 pts\n\nBlock devices:\n  8 sd\n";
        let rules = [
            deny_all(),
            rule(true, LinuxDeviceType::C, 10, 229, "rw"),
            rule(true, LinuxDeviceType::B, 8, -1, "r"),
            rule(true, LinuxDeviceType::B, 9, -1, "r"),
            rule(true, LinuxDeviceType::C, 4, 1, "rw"),
            rule(false, LinuxDeviceType::C, 4, -1, "rw"),
        ];
        let rules = Rules::new(&rules).unwrap();
        let names: Vec<_> = rules.exceptions.iter().take(3).map(|rule| rule.unit_name(drivers)).collect();
        let texts: Vec<_> = names.iter().map(Option::as_deref).collect();
        assert_eq!(texts, [Some("/dev/char/10:229"), Some("block-sd"), None]);
        assert!(rules.exceptions[4].covers(&rules.exceptions[3]), "a denial takes back what it is about");
        assert_eq!(driver(drivers, "char", 136), Some("pts"));
        assert_eq!(driver(drivers, "block", 136), None);
    }

    proptest! {
        /// The program decides as the list does, for any rules and any question.
        #[test]
        fn the_program_decides_as_the_rules(
            list in prop::collection::vec((any::<bool>(), any::<bool>(), -1_i64..4, -1_i64..4, 1_u32..8), 0..8),
            open in any::<bool>(),
            question in (any::<bool>(), 0_u32..4, 0_u32..4, 1_u32..8),
        ) {
            let letters = |bits: u32| {
                [('m', 1), ('r', 2), ('w', 4)].iter().filter(|(_, bit)| bits & bit != 0).map(|(l, _)| l).collect::<String>()
            };
            let mut rules = vec![LinuxDeviceCgroupBuilder::default().allow(open).access("rwm").build().unwrap()];
            for (allow, block, major, minor, access) in &list {
                let kind = if *block { LinuxDeviceType::B } else { LinuxDeviceType::C };
                rules.push(rule(*allow, kind, *major, *minor, &letters(*access)));
            }
            let rules = Rules::new(&rules).unwrap();
            let (block, major, minor, access) = question;
            let kind = if block { 'b' } else { 'c' };
            let expected = rules.exceptions.iter().rev().find_map(|rule| {
                let own = u32::from(rule.mknod) | u32::from(rule.read) << 1 | u32::from(rule.write) << 2;
                let same = rule.kind == kind
                    && rule.major.is_none_or(|own| own == major)
                    && rule.minor.is_none_or(|own| own == minor);
                let fits = if rule.allow { access & !own == 0 } else { access & own != 0 };
                (same && fits).then_some(rule.allow)
            });
            let context = bpf::DeviceContext {
                access_type: access << 16 | if block { bpf::BLOCK } else { bpf::CHAR },
                major,
                minor,
            };
            prop_assert_eq!(bpf::run(&rules.program(), context), expected.unwrap_or(rules.allow_by_default));
        }
    }
}
