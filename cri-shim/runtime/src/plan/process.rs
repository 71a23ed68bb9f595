//! A process as the child needs it: C strings, numbers, a compiled filter. Made before the fork.

use std::ffi::{CString, c_char};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{Capabilities, PosixRlimitType, Process};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, Gid, Uid};

use super::schedule;
use crate::error::Error;
use crate::hooks::StartHooks;
use crate::host::sys::SchedAttr;
use crate::seccomp::Filter;
use crate::stdio::{Stdio, WindowSize};

/// Everything about a process but the container around it.
#[derive(Debug)]
pub(crate) struct ProcessPlan {
    /// The name of the program as the specification gives it, for messages.
    pub(crate) program: String,
    /// Where it can be, in the order to look.
    pub(crate) candidates: Vec<CString>,
    pub(crate) argv: Strings,
    pub(crate) envp: Strings,
    pub(crate) cwd: CString,
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
    pub(crate) umask: Option<Mode>,
    /// The capabilities that stay in the bounding set.
    pub(crate) bounding: u64,
    pub(crate) capabilities: CapabilitySets,
    pub(crate) ambient: u64,
    pub(crate) rlimits: Vec<(Resource, Rlimit)>,
    pub(crate) oom_score_adj: Option<Vec<u8>>,
    pub(crate) no_new_privileges: bool,
    /// What is written to AppArmor's file for the next exec.
    pub(crate) apparmor: Option<Vec<u8>>,
    pub(crate) selinux: Option<Vec<u8>>,
    pub(crate) seccomp: Option<Filter>,
    pub(crate) keyring: CString,
    pub(crate) scheduler: Option<SchedAttr>,
    pub(crate) io_priority: Option<i32>,
    pub(crate) subreaper: bool,
    pub(crate) streams: Streams,
    /// What runs before the program.
    pub(crate) hooks: Option<StartHooks>,
}

/// An array of C strings with the array of pointers that exec takes.
#[derive(Debug)]
pub(crate) struct Strings {
    pointers: Vec<*const c_char>,
    _owned: Vec<CString>,
}

impl Strings {
    fn new(owned: Vec<CString>) -> Self {
        let pointers = owned.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect();
        Self { pointers, _owned: owned }
    }

    /// The pointers and the null after them.
    pub(crate) fn pointers(&self) -> &[*const c_char] {
        &self.pointers
    }
}

/// The standard streams, numbered above 2.
#[derive(Debug)]
pub(crate) enum Streams {
    /// Open files; the flag says that it is to be the container's own `/dev/null` where that is one.
    Files([(OwnedFd, bool); 3]),
    /// A terminal to be made.
    Terminal(Option<WindowSize>),
}

/// What the container gives to each of its processes.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) id: String,
    pub(crate) seccomp: Option<Filter>,
    pub(crate) subreaper: bool,
    /// The root file system as this process sees it, to look up a home directory.
    pub(crate) root: Option<OwnedFd>,
}

/// Makes the plan.
pub(crate) fn plan(process: &Process, stdio: Stdio, common: Common) -> Result<ProcessPlan, Error> {
    let args = process.args().as_deref().unwrap_or_default();
    let program = args.first().filter(|program| !program.is_empty());
    let program = program.ok_or_else(|| Error::spec("process.args", "names no program"))?.clone();
    refuse(process)?;
    let user = process.user();
    let env = environment(process, common.root.as_ref())?;
    let cwd = process.cwd();
    if !cwd.is_absolute() {
        return Err(Error::spec("process.cwd", format!("{} is not absolute", cwd.display())));
    }
    let caps = process.capabilities().as_ref();
    let bits = |get: fn(&oci_spec::runtime::LinuxCapabilities) -> &Option<Capabilities>| {
        caps.and_then(|caps| get(caps).as_ref()).map_or(0, capability_bits)
    };
    let set = |bits: u64| CapabilitySet::from_bits_retain(bits);
    Ok(ProcessPlan {
        candidates: candidates(&program, &env)?,
        argv: Strings::new(c_strings(args, "process.args")?),
        envp: Strings::new(c_strings(&env, "process.env")?),
        cwd: c_string(cwd.as_os_str().as_encoded_bytes(), "process.cwd")?,
        uid: Uid::from_raw(user.uid()),
        gid: Gid::from_raw(user.gid()),
        groups: user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect(),
        umask: user.umask().map(Mode::from_raw_mode),
        bounding: bits(|caps| caps.bounding()),
        capabilities: CapabilitySets {
            effective: set(bits(|caps| caps.effective())),
            permitted: set(bits(|caps| caps.permitted())),
            inheritable: set(bits(|caps| caps.inheritable())),
        },
        ambient: bits(|caps| caps.ambient()),
        rlimits: rlimits(process)?,
        oom_score_adj: process.oom_score_adj().map(|score| score.to_string().into_bytes()),
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        apparmor: apparmor(process)?,
        selinux: selinux(process),
        seccomp: common.seccomp,
        keyring: c_string(format!("_ses.{}", common.id).as_bytes(), "id")?,
        scheduler: process.scheduler().as_ref().map(schedule::attributes),
        io_priority: process.io_priority().as_ref().map(schedule::io_priority).transpose()?,
        subreaper: common.subreaper,
        streams: streams(stdio, process)?,
        hooks: None,
        program,
    })
}

/// Parts that are not offered.
fn refuse(process: &Process) -> Result<(), Error> {
    if process.exec_cpu_affinity().is_some() {
        return Err(Error::spec("process.execCPUAffinity", "is not offered"));
    }
    if process.command_line().is_some() {
        return Err(Error::spec("process.commandLine", "is for Windows"));
    }
    Ok(())
}

/// A C string of bytes from the specification.
pub(crate) fn c_string(bytes: &[u8], field: &str) -> Result<CString, Error> {
    CString::new(bytes).map_err(|error| Error::spec(field, error.to_string()))
}

/// Texts as exec takes them.
pub(crate) fn strings(texts: &[String], field: &str) -> Result<Strings, Error> {
    c_strings(texts, field).map(Strings::new)
}

fn c_strings(texts: &[String], field: &str) -> Result<Vec<CString>, Error> {
    texts.iter().enumerate().map(|(at, text)| c_string(text.as_bytes(), &format!("{field}[{at}]"))).collect()
}

/// The environment: of a name given twice the last value counts, at the place of the first; `HOME` is always there.
fn environment(process: &Process, root: Option<&OwnedFd>) -> Result<Vec<String>, Error> {
    let mut env: Vec<String> = Vec::new();
    for (at, variable) in process.env().iter().flatten().enumerate() {
        let Some((name, _)) = variable.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            return Err(Error::spec(format!("process.env[{at}]"), format!("{variable:?} is not NAME=value")));
        };
        let same = |known: &&mut String| known.split_once('=').is_some_and(|(known, _)| known == name);
        match env.iter_mut().find(same) {
            Some(known) => known.clone_from(variable),
            None => env.push(variable.clone()),
        }
    }
    let home = env.iter().position(|variable| variable.starts_with("HOME="));
    if home.is_none_or(|at| env.get(at).is_some_and(|home| home == "HOME=")) {
        let found = root.and_then(|root| super::home::of(root.as_fd(), process.user().uid()));
        let value = format!("HOME={}", found.unwrap_or_else(|| "/".to_owned()));
        match home.and_then(|at| env.get_mut(at)) {
            Some(empty) => *empty = value,
            None => env.push(value),
        }
    }
    Ok(env)
}

/// Where the program can be: its path when it has a slash, else in each directory of `PATH`.
fn candidates(program: &str, env: &[String]) -> Result<Vec<CString>, Error> {
    if program.contains('/') {
        return Ok(vec![c_string(program.as_bytes(), "process.args[0]")?]);
    }
    let path = env.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or_default();
    // Entries relative to the working directory are a known trap; they are left out.
    path.split(':')
        .filter(|directory| directory.starts_with('/'))
        .map(|directory| c_string(format!("{directory}/{program}").as_bytes(), "process.args[0]"))
        .collect()
}

/// The kernel's numbering is the alphabet of `linux/capability.h`; `oci_spec` keeps names only.
fn capability_bits(names: &Capabilities) -> u64 {
    names.iter().filter_map(|name| super::caps::number(*name)).fold(0, |bits, number| bits | (1 << number))
}

fn rlimits(process: &Process) -> Result<Vec<(Resource, Rlimit)>, Error> {
    let limit = |value: u64| (value != u64::MAX).then_some(value);
    let mut limits: Vec<(Resource, Rlimit)> = Vec::new();
    for (at, rlimit) in process.rlimits().iter().flatten().enumerate() {
        let kind = resource(rlimit.typ());
        if limits.iter().any(|(known, _)| *known == kind) {
            return Err(Error::spec(format!("process.rlimits[{at}].type"), "is given twice"));
        }
        if rlimit.soft() > rlimit.hard() {
            return Err(Error::spec(format!("process.rlimits[{at}].soft"), "is above the hard limit"));
        }
        limits.push((kind, Rlimit { current: limit(rlimit.soft()), maximum: limit(rlimit.hard()) }));
    }
    Ok(limits)
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

fn apparmor(process: &Process) -> Result<Option<Vec<u8>>, Error> {
    let Some(profile) = process.apparmor_profile().as_deref().filter(|profile| !profile.is_empty()) else {
        return Ok(None);
    };
    if !Path::new("/sys/kernel/security/apparmor").exists() {
        return Err(Error::Unavailable {
            feature: "process.apparmorProfile",
            reason: "AppArmor is not enabled on this host".to_owned(),
        });
    }
    Ok(Some(format!("exec {profile}").into_bytes()))
}

/// Without SELinux a label says nothing, as in other runtimes.
fn selinux(process: &Process) -> Option<Vec<u8>> {
    let label = process.selinux_label().as_deref().filter(|label| !label.is_empty())?;
    Path::new("/sys/fs/selinux/enforce").exists().then(|| label.as_bytes().to_vec())
}

/// The streams, moved out of the numbers 0 to 2, where the child puts them.
fn streams(stdio: Stdio, process: &Process) -> Result<Streams, Error> {
    let terminal = process.terminal().unwrap_or(false);
    let (stdin, stdout, stderr) = match (stdio, terminal) {
        (Stdio::Terminal { size }, true) => {
            let part = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
            let of_spec = process
                .console_size()
                .map(|size| WindowSize { rows: part(size.height()), columns: part(size.width()) });
            return Ok(Streams::Terminal(size.or(of_spec)));
        }
        (Stdio::Fds { stdin, stdout, stderr }, false) => (stdin, stdout, stderr),
        (Stdio::Terminal { .. }, false) => {
            return Err(Error::spec("process.terminal", "is not set, and the streams are to be a terminal"));
        }
        (Stdio::Fds { .. }, true) => {
            return Err(Error::spec("process.terminal", "is set, and the streams are to be open files"));
        }
    };
    Ok(Streams::Files([stream(stdin)?, stream(stdout)?, stream(stderr)?]))
}

fn stream(file: Option<OwnedFd>) -> Result<(OwnedFd, bool), Error> {
    let file = match file {
        Some(file) => file,
        None => std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(Error::step("open /dev/null"))?
            .into(),
    };
    let stat = rustix::fs::fstat(&file).map_err(Error::step("look at a stream"))?;
    let null = is_null_device(&stat);
    if file.as_raw_fd() > 2 {
        return Ok((file, null));
    }
    let moved = rustix::io::fcntl_dupfd_cloexec(&file, 3).map_err(Error::step("move a stream"))?;
    Ok((moved, null))
}

/// Whether a file is the null device.
pub(crate) fn is_null_device(stat: &rustix::fs::Stat) -> bool {
    rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice
        && stat.st_rdev == rustix::fs::makedev(1, 3)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::ProcessBuilder;

    use super::*;

    fn process(args: &[&str], env: &[&str]) -> Process {
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        ProcessBuilder::default().args(owned(args)).env(owned(env)).cwd("/").build().unwrap()
    }

    #[test]
    fn the_environment_has_each_name_once_and_a_home() {
        let env = environment(&process(&["x"], &["A=1", "B=2", "A=3"]), None).unwrap();
        assert_eq!(env, ["A=3", "B=2", "HOME=/"]);
        let env = environment(&process(&["x"], &["HOME=/h"]), None).unwrap();
        assert_eq!(env, ["HOME=/h"]);
        assert!(environment(&process(&["x"], &["novalue"]), None).is_err());
    }

    #[test]
    fn a_program_is_looked_for_in_path_unless_it_has_a_slash() {
        let env = ["PATH=/a:b::/c".to_owned()];
        let found = candidates("sh", &env).unwrap();
        assert_eq!(found, [c"/a/sh".to_owned(), c"/c/sh".to_owned()]);
        assert_eq!(candidates("./sh", &env).unwrap(), [c"./sh".to_owned()]);
        assert!(candidates("sh", &[]).unwrap().is_empty());
    }

    #[test]
    fn bad_fields_are_named() {
        let common = || Common { id: "x".to_owned(), seccomp: None, subreaper: false, root: None };
        let text = |process: &Process| plan(process, Stdio::null(), common()).unwrap_err().to_string();
        assert_eq!(text(&process(&[], &[])), "process.args: names no program");
        assert!(text(&process(&["a\0b"], &[])).starts_with("process.args[0]: "));
        let mut terminal = process(&["x"], &[]);
        terminal.set_terminal(Some(true));
        assert!(text(&terminal).starts_with("process.terminal: "));
        let mut relative = process(&["x"], &[]);
        relative.set_cwd("tmp".into());
        assert!(text(&relative).starts_with("process.cwd: "));
    }
}
