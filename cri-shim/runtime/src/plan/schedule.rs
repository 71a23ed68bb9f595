//! Processor and disk scheduling of a process.

use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, Scheduler,
};

use crate::error::Error;
use crate::host::sys::SchedAttr;

/// `process.scheduler` as `sched_setattr` takes it.
pub(crate) fn attributes(scheduler: &Scheduler) -> SchedAttr {
    SchedAttr {
        size: u32::try_from(size_of::<SchedAttr>()).unwrap_or(48),
        policy: match scheduler.policy() {
            LinuxSchedulerPolicy::SchedOther => 0,
            LinuxSchedulerPolicy::SchedFifo => 1,
            LinuxSchedulerPolicy::SchedRr => 2,
            LinuxSchedulerPolicy::SchedBatch => 3,
            LinuxSchedulerPolicy::SchedIso => 4,
            LinuxSchedulerPolicy::SchedIdle => 5,
            LinuxSchedulerPolicy::SchedDeadline => 6,
        },
        flags: scheduler.flags().iter().flatten().fold(0, |bits, flag| bits | flag_bit(*flag)),
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().and_then(|value| u32::try_from(value).ok()).unwrap_or(0),
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    }
}

fn flag_bit(flag: LinuxSchedulerFlag) -> u64 {
    match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    }
}

/// `process.ioPriority` as `ioprio_set` takes it: the class above the level.
pub(crate) fn io_priority(priority: &LinuxIOPriority) -> Result<i32, Error> {
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    match i32::try_from(priority.priority()) {
        Ok(level @ 0..=7) => Ok((class << 13) | level),
        _ => Err(Error::spec("process.ioPriority.priority", "is not 0 to 7")),
    }
}
