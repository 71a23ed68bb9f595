//! The lane *vm-debian*: Debian 12 with systemd, containerd, runc and crun from its packages, and keelson-cri as a service
//! with each cgroup driver, checked by root tests and by our own conformance suite with every handler.
//!
//! The same disks are booted for each layout of cgroups that systemd can mount ([`BOOTS`]), two guests at a time. To add a package's root
//! tests, see [`super::suites`]; to add a run of the suite, add a [`Cell`]; any other check is a [`Job`] in [`jobs`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::disks::{self, DRIVERS, SUITE_IMAGES};
use super::guest::{self, Job};
use super::kernel::Kernel;
use super::programs::{self, Program};
use super::qemu::Machine;
use super::suites::{Lane, Suite};
use super::{Choice, cache, output};
use crate::cmd::step;

/// One start of the guest.
struct Boot {
    /// The layout of cgroups, and the beginning of its jobs' names.
    name: &'static str,
    /// What has systemd mount them so.
    parameters: &'static str,
    /// Succeeds where they are so.
    check: &'static str,
    /// Whether the root tests are run, too.
    tests: bool,
    cells: &'static [Cell],
    /// The cgroup driver of a whole node that is started in the guest and checked.
    node: Option<&'static str>,
}

/// One run of the conformance suite.
struct Cell {
    driver: &'static str,
    handler: &'static str,
    /// Cases, as the suite's `--filter` takes them.
    cases: &'static str,
}

const fn cell(driver: &'static str, handler: &'static str, cases: &'static str) -> Cell {
    Cell { driver, handler, cases }
}

/// For crun, which many a development machine's hybrid cgroups keep out: nothing else runs these with it.
const MOST: &str = "security:|resources:|container process:|exec sync:|user namespaces:|mounts:|checkpoint";
/// What the kernel has a part in; with keelson and runc everything else is checked on any machine.
const KERNEL: &str = "AppArmor|resources:|container exit:|user namespaces:|mounts:|devices:|checkpoint";
/// What depends on cgroups and their driver.
const CGROUPS: &str = "resources:|container exit: beyond|stats: PodSandboxStats|stats: the working";
/// What this guest has on purpose: cases that a lesser machine skips must run here.
const SURE: &str = "AppArmor RuntimeDefault confines|AppArmor RuntimeDefault refuses|AppArmor Localhost|hugepage|daemon-reload";
/// The same of handlers that CRIU is built into.
const SURE_WITH_CRIU: &str = "|checkpoint";

/// Cases that must not be skipped with a handler. Debian's crun is built without CRIU.
fn sure(handler: &str) -> String {
    let criu = if handler == "crun" { "" } else { SURE_WITH_CRIU };
    format!("{SURE}{criu}")
}

/// Version 2 alone.
const UNIFIED: &str = "systemd.unified_cgroup_hierarchy=1";
const IS_UNIFIED: &str = "test -f /sys/fs/cgroup/cgroup.controllers";

const BOOTS: &[Boot] = &[
    Boot { name: "v2", parameters: UNIFIED, check: IS_UNIFIED, tests: true, cells: &[], node: None },
    // In a guest of their own, beside the root tests.
    Boot {
        name: "v2-suite",
        parameters: UNIFIED,
        check: IS_UNIFIED,
        tests: false,
        cells: &[
            cell("systemd", "keelson", KERNEL),
            cell("systemd", "runc", KERNEL),
            cell("systemd", "crun", MOST),
            cell("cgroupfs", "keelson", CGROUPS),
            cell("cgroupfs", "runc", CGROUPS),
            cell("cgroupfs", "crun", CGROUPS),
        ],
        node: None,
    },
    Boot {
        name: "v2-node",
        parameters: UNIFIED,
        check: IS_UNIFIED,
        tests: false,
        cells: &[],
        node: Some("systemd"),
    },
    Boot {
        name: "hybrid",
        parameters: "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=0",
        check: "test -f /sys/fs/cgroup/unified/cgroup.controllers -a -d /sys/fs/cgroup/memory",
        tests: false,
        cells: &[
            cell("systemd", "keelson", CGROUPS),
            cell("systemd", "runc", CGROUPS),
            cell("systemd", "crun", CGROUPS),
            cell("cgroupfs", "keelson", CGROUPS),
            cell("cgroupfs", "runc", CGROUPS),
        ],
        node: None,
    },
    Boot {
        name: "v1",
        parameters: "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1",
        check: "test -d /sys/fs/cgroup/memory -a ! -e /sys/fs/cgroup/unified",
        tests: false,
        cells: &[
            cell("systemd", "keelson", CGROUPS),
            cell("systemd", "runc", CGROUPS),
            cell("systemd", "crun", CGROUPS),
            cell("cgroupfs", "keelson", CGROUPS),
        ],
        node: None,
    },
    // Version 1 counts swap only where it is told to.
    Boot {
        name: "v1-node",
        parameters: "systemd.unified_cgroup_hierarchy=0 systemd.legacy_systemd_cgroup_controller=1 swapaccount=1",
        check: "test -f /sys/fs/cgroup/memory/memory.memsw.limit_in_bytes -a ! -e /sys/fs/cgroup/unified",
        tests: false,
        cells: &[],
        node: Some("cgroupfs"),
    },
];

/// Cases of the node suite that depend on the kernel, its cgroups and their driver. Not those of users of pods: with volumes
/// they need id-mapped mounts of tmpfs, which come with Linux 6.3.
const NODE_CASES: &str = "Container resources:|Pod InPlace Resize|Pods: equal requests|Pods: requests below|\
                          Pods: an init container's resources|stats/summary counts|metrics/resource|metrics/cadvisor|\
                          EmptyDir volumes: a pod that writes|EmptyDir volumes: a size limit|AppArmor|\
                          Sysctls: a safe|a privileged container has|Container Runtime: a signal|\
                          Pod admission: more memory|Kubectl exec: the exit code|\
                          Node: capacity and allocatable";
/// Those that must not be skipped on version 2: what the guest has on purpose.
const NODE_SURE: &str = "may swap|huge pages|AppArmor|process ids|oom_score_adj|cgroups of a pod";
/// The same on version 1, whose swap is for nobody.
const NODE_SURE_V1: &str = "huge pages|AppArmor|process ids|oom_score_adj|cgroups of a pod";
/// Longest that the node may take to be Ready, and that its suite may take.
const NODE_LIMITS: (u64, u64) = (900, 3000);
/// Longest that one case of the node suite may take; half of it is the longest wait.
const NODE_CASE_LIMIT: u64 = 480;

/// Longest that one test program may take.
const TEST_LIMIT: u64 = 900;
/// Longest that the suite may take with one handler and driver.
const SUITE_LIMIT: u64 = 2400;
/// Longest that one case of the suite may take.
const CASE_LIMIT: u64 = 300;
/// Longest that the machine may run.
const DEADLINE: Duration = Duration::from_secs(7200);

/// Makes the disks, boots for each layout of cgroups, and tells the outcome of each check.
pub(crate) fn run(repo: &Path, choice: &Choice) -> Result<()> {
    let boots = chosen(repo, choice)?;
    if choice.list {
        for name in boots.iter().flat_map(|(_, jobs)| jobs).map(|job| &job.name) {
            println!("{name}");
        }
        return Ok(());
    }
    if !choice.no_build {
        crate::binaries::build(repo)?;
    }
    let directory = output(repo, "debian");
    let programs = step("building the tests for the guest", || {
        let wanted: BTreeSet<_> =
            boots.iter().flat_map(|(_, jobs)| jobs).filter_map(|job| job.test.clone()).collect();
        programs::root_tests(repo, &wanted)
    })?;
    let (kernel, system) = {
        let _alone = super::lock(&cache(repo).join("lock"), "makes the guest's disks")?;
        let kernel = step("fetching Debian's kernel for clouds", || Kernel::fetch(&cache(repo)))?;
        let system = disks::system(repo, &kernel)?;
        (kernel, system)
    };
    crate::conformance::prepare(&repo.join(SUITE_IMAGES))?;
    let payload = directory.join("payload.img");
    step("packing what the guest runs", || {
        let lists = boots.iter().map(|(boot, jobs)| {
            let jobs: Vec<Job> = jobs.iter().map(|planned| planned.job(&programs)).collect();
            Ok((list_name(boot), serde_json::to_vec_pretty(&jobs)?))
        });
        let lists = lists.collect::<Result<Vec<_>>>()?;
        disks::payload(repo, &programs, &lists, &directory.join("payload"), &payload)
    })?;
    let initramfs = directory.join("initramfs.cpio");
    crate::process::write_atomic(&initramfs, &disks::first_stage(repo, &kernel)?)?;
    super::run_guests(
        &boots,
        choice.together,
        |(boot, _)| boot.name.to_owned(),
        |(boot, jobs)| {
            println!("==> {} checks in Debian 12 on Linux {}: {}", jobs.len(), kernel.version, boot.name);
            let output = directory.join(boot.name);
            let machine = Machine {
                kernel: &kernel.image,
                initramfs: &initramfs,
                command_line: &format!(
                    "rdinit={} {}/dev/vda {}/keelson/{} systemd.show_status=1 apparmor=1 security=apparmor {} -- vm-init",
                    guest::SELF,
                    guest::ROOT_PARAMETER,
                    guest::JOBS_PARAMETER,
                    list_name(boot),
                    boot.parameters,
                ),
                disks: &[system.clone(), payload.clone()],
                memory: 3072,
                deadline: DEADLINE,
                output: &output,
            };
            Ok((machine.run()?, output))
        },
    )
}

fn list_name(boot: &Boot) -> String {
    format!("jobs-{}.json", boot.name)
}

/// A job before its programs are built.
struct Planned {
    name: String,
    command: Vec<String>,
    seconds: u64,
    collect: Vec<PathBuf>,
    /// The test program that it runs instead of a command: its package's folder, and its name.
    test: Option<(String, String)>,
    modules: Vec<&'static str>,
    env: &'static [(&'static str, &'static str)],
}

impl Planned {
    fn new(name: String, command: &str, seconds: u64) -> Self {
        let command = command.split(' ').map(str::to_owned).collect();
        Self { name, command, seconds, collect: Vec::new(), test: None, modules: Vec::new(), env: &[] }
    }

    /// Tests name executables by where cargo built them: the guest gets the same paths as links.
    fn job(&self, programs: &[Program]) -> Job {
        let in_guest = |file: &Path| Path::new("/keelson/bin").join(file.file_name().unwrap_or_default());
        let links = programs.iter().map(|program| (program.file.clone(), in_guest(&program.file))).collect();
        let program = programs.iter().find(|program| {
            program.is_test
                && self
                    .test
                    .as_ref()
                    .is_some_and(|(folder, name)| *folder == program.folder && *name == program.name)
        });
        let program = program.map(|program| program.file.to_string_lossy().into_owned());
        let mut env = BTreeMap::from([("KEELSON_VM".to_owned(), "debian".to_owned())]);
        env.extend(self.env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Job {
            name: self.name.clone(),
            command: program.into_iter().chain(self.command.iter().cloned()).collect(),
            env,
            directory: PathBuf::from("/keelson"),
            modules: self.modules.iter().map(|name| (*name).to_owned()).collect(),
            links,
            seconds: self.seconds,
            collect: self.collect.clone(),
        }
    }
}

/// The boots in which something is chosen, with their jobs. The checks that the guest is as it should be always run.
fn chosen(repo: &Path, choice: &Choice) -> Result<Vec<(&'static Boot, Vec<Planned>)>> {
    let mut found = Vec::new();
    for boot in BOOTS {
        let all = jobs(repo, boot, choice.cases.as_deref())?;
        let (always, others): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|job| job.name.contains("guest is"));
        let others: Vec<_> = others.into_iter().filter(|job| choice.takes(&job.name)).collect();
        if !others.is_empty() {
            found.push((boot, always.into_iter().chain(others).collect()));
        }
    }
    anyhow::ensure!(!found.is_empty(), "no job is chosen; `--list` prints their names");
    Ok(found)
}

/// The checks of a boot, in their order; `other_cases` take the place of what each run of the suite checks.
fn jobs(repo: &Path, boot: &Boot, other_cases: Option<&str>) -> Result<Vec<Planned>> {
    let services: Vec<String> = DRIVERS.iter().map(|driver| format!("keelson-cri@{driver}")).collect();
    let mut jobs = vec![
        Planned::new(
            format!("{}: the guest is up with systemd and keelson-cri", boot.name),
            &format!("systemctl is-active containerd {}", services.join(" ")),
            120,
        ),
        Planned::new(format!("{}: the guest is one with these cgroups", boot.name), boot.check, 10),
    ];
    for suite in Suite::of(Lane::Debian).filter(|_| boot.tests) {
        for test in suite.names(repo)? {
            let name = format!("{}: {} {test}", boot.name, suite.folder);
            let mut job = Planned::new(name, &guest::TEST_ARGUMENTS.join(" "), TEST_LIMIT);
            job.command.extend(suite.arguments.iter().map(|argument| (*argument).to_owned()));
            (job.modules, job.env) = (suite.modules(), suite.env);
            job.test = Some((suite.folder.to_owned(), test));
            jobs.push(job);
        }
    }
    for Cell { driver, handler, cases } in boot.cells {
        let junit = PathBuf::from(format!("/tmp/cri-{driver}-{handler}.xml"));
        let command = format!(
            "/keelson/bin/xtask conformance cri --endpoint unix:///run/keelson/{driver}/cri.sock --handler {handler} \
             --known /keelson/known-{handler}.txt --parallel 4 --deadline {CASE_LIMIT} --junit {} --filter",
            junit.display()
        );
        let name = format!("{}: conformance cri, {driver} driver, {handler}", boot.name);
        let mut job = Planned::new(name, &command, SUITE_LIMIT);
        job.command.push(other_cases.unwrap_or(cases).to_owned());
        job.command.extend(["--never-skip".to_owned(), sure(handler)]);
        job.collect.push(junit);
        jobs.push(job);
    }
    if let Some(driver) = boot.node {
        jobs.extend(node_jobs(boot.name, driver, other_cases));
    }
    Ok(jobs)
}

/// A whole node: its start, which no choice leaves out, its suite, and the shutdown of its machine, which is the end.
fn node_jobs(boot: &str, driver: &str, other_cases: Option<&str>) -> [Planned; 3] {
    let start = format!("/keelson/bin/xtask vm-node start --driver {driver}");
    let start = Planned::new(format!("{boot}: the guest is a node, {driver} driver"), &start, NODE_LIMITS.0);
    let junit = PathBuf::from("/tmp/node.xml");
    let command = format!(
        "/keelson/bin/xtask conformance node --kubeconfig {} --parallel 3 --deadline {NODE_CASE_LIMIT} --junit {} --filter",
        super::node::kubeconfig().display(),
        junit.display()
    );
    let mut suite =
        Planned::new(format!("{boot}: conformance node, {driver} driver"), &command, NODE_LIMITS.1);
    let sure = if boot.starts_with("v1") { NODE_SURE_V1 } else { NODE_SURE };
    suite.command.extend([other_cases.unwrap_or(NODE_CASES), "--never-skip", sure].map(str::to_owned));
    suite.collect.push(junit);
    let shutdown = Planned::new(
        format!("{boot}: a shutdown by logind waits for pods"),
        "/keelson/bin/xtask vm-node shutdown",
        NODE_LIMITS.0,
    );
    [start, suite, shutdown]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_keeps_the_checks_of_the_guest() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let choice = Choice { only: "hybrid systemd runc".to_owned(), ..Choice::default() };
        let boots = chosen(repo, &choice).unwrap();
        let names: Vec<_> = boots.iter().flat_map(|(_, jobs)| jobs).map(|job| job.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "hybrid: the guest is up with systemd and keelson-cri",
                "hybrid: the guest is one with these cgroups",
                "hybrid: conformance cri, systemd driver, runc",
            ]
        );
        let choice = Choice { only: "no such job".to_owned(), ..Choice::default() };
        assert!(chosen(repo, &choice).is_err());
    }
}
