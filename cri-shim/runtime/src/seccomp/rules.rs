//! A profile's rules, given to libseccomp.

use std::collections::BTreeMap;

use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSyscall};

use super::enosys;
use crate::error::Error;
use crate::host::libseccomp::{Compare, Context, Library};

/// Most instructions that the kernel takes.
const MOST: usize = 4096;

/// Compiles a profile.
pub(crate) fn compile(profile: &LinuxSeccomp) -> Result<Vec<libc::sock_filter>, Error> {
    refuse(profile)?;
    let library = Library::load()?;
    let default = profile.default_action().as_u32(profile.default_errno_ret());
    let mut context = library.context(default)?;
    for arch in profile.architectures().iter().flatten().filter(|arch| **arch != Arch::ScmpArchNative) {
        context
            .add_arch(*arch as u32)
            .map_err(Error::step(format!("linux.seccomp.architectures: add {arch}")))?;
    }
    for (at, rule) in profile.syscalls().iter().flatten().enumerate() {
        let field = format!("linux.seccomp.syscalls[{at}]");
        add(&library, &mut context, rule, default, &field)?;
    }
    let mut program = unknown_calls(&library, profile);
    program.extend(context.export()?);
    if program.len() > MOST {
        return Err(Error::spec(
            "linux.seccomp",
            format!("makes {} instructions, more than {MOST}", program.len()),
        ));
    }
    Ok(program)
}

fn refuse(profile: &LinuxSeccomp) -> Result<(), Error> {
    let notify = |action: LinuxSeccompAction| action == LinuxSeccompAction::ScmpActNotify;
    let rules = profile.syscalls().iter().flatten();
    if profile.listener_path().is_some()
        || notify(profile.default_action())
        || rules.clone().any(|rule| notify(rule.action()))
    {
        return Err(Error::spec("linux.seccomp.listenerPath", "SCMP_ACT_NOTIFY is not offered"));
    }
    Ok(())
}

fn add(
    library: &Library,
    context: &mut Context<'_>,
    rule: &LinuxSyscall,
    default: u32,
    field: &str,
) -> Result<(), Error> {
    let action = rule.action().as_u32(rule.errno_ret());
    // It says what holds anyway, and libseccomp takes that for a mistake.
    if action == default {
        return Ok(());
    }
    let conditions: Vec<Compare> = rule
        .args()
        .iter()
        .flatten()
        .enumerate()
        .map(|(at, arg)| condition(arg, &format!("{field}.args[{at}]")))
        .collect::<Result<_, _>>()?;
    for name in rule.names() {
        // A name that this library does not know is a call that this kernel most likely does not have.
        let Some(call) = library.number(name) else { continue };
        let step = || Error::step(format!("{field}: add a rule for {name}"));
        if repeats(&conditions) {
            // One argument compared twice cannot be asked in one rule: any of the conditions is enough, as elsewhere.
            for one in &conditions {
                context.add_rule(action, call, std::slice::from_ref(one)).map_err(step())?;
            }
        } else {
            context.add_rule(action, call, &conditions).map_err(step())?;
        }
    }
    Ok(())
}

fn repeats(conditions: &[Compare]) -> bool {
    conditions
        .iter()
        .enumerate()
        .any(|(at, one)| conditions.iter().take(at).any(|other| other.arg == one.arg))
}

fn condition(arg: &LinuxSeccompArg, field: &str) -> Result<Compare, Error> {
    let index = u32::try_from(arg.index()).ok().filter(|index| *index < 6);
    let index = index.ok_or_else(|| Error::spec(format!("{field}.index"), "is not 0 to 5"))?;
    Ok(Compare { arg: index, op: arg.op() as u32, a: arg.value(), b: arg.value_two().unwrap_or(0) })
}

/// Calls that are newer than the profile get ENOSYS, so that programs fall back to older ones, unless the profile allows
/// by default or says so itself.
fn unknown_calls(library: &Library, profile: &LinuxSeccomp) -> Vec<libc::sock_filter> {
    const ENOSYS: u32 = 38;
    let permissive =
        matches!(profile.default_action(), LinuxSeccompAction::ScmpActAllow | LinuxSeccompAction::ScmpActLog);
    if permissive || profile.default_errno_ret() == Some(ENOSYS) {
        return Vec::new();
    }
    let mut architectures = vec![library.native_arch()];
    architectures
        .extend(profile.architectures().iter().flatten().map(|arch| *arch as u32).filter(|arch| *arch != 0));
    let mut last = BTreeMap::new();
    for arch in architectures {
        let names = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
        // Negative numbers stand for calls that this architecture does not have.
        let numbers = names.filter_map(|name| u32::try_from(library.number_on(arch, name)?).ok());
        if let Some(highest) = numbers.max() {
            last.insert(arch, highest);
        }
    }
    enosys::prologue(&last)
}
