//! Where the cgroup hierarchies are mounted, and the files of one cgroup.
//!
//! One reader for version 1, hybrid and version 2 nodes. Files of running containers stay open from one request for figures to
//! the next ([`CgroupFiles`]).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use cri_shim_core::stats::{self, CgroupDetails, CgroupUsage};
use cri_shim_runtime::cgroup::{OomWatch, Paths};

/// The version 2 tree that is mounted beside version 1 controllers, as the name of a controller.
const UNIFIED: &str = "unified";

use super::files::kernel_text;
use super::handles::{CgroupFiles, Open};
use super::process;
use crate::error::RuntimeError;

/// The mounted hierarchies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hierarchies {
    /// One directory per controller; a version 2 tree mounted beside them is called `unified`.
    V1(BTreeMap<String, PathBuf>),
    /// A single tree.
    V2(PathBuf),
}

impl Hierarchies {
    /// Reads them from the text of `/proc/self/mountinfo`, with runc's rule: version 2 is what is mounted at
    /// `/sys/fs/cgroup` itself.
    pub fn from_mountinfo(mountinfo: &str) -> Self {
        let mut controllers = BTreeMap::new();
        for line in mountinfo.lines() {
            let Some((head, tail)) = line.split_once(" - ") else { continue };
            let (Some(point), mut tail) = (head.split(' ').nth(4), tail.split(' ')) else { continue };
            match tail.next() {
                Some("cgroup2") if point == "/sys/fs/cgroup" => return Self::V2(PathBuf::from(point)),
                Some("cgroup2") => {
                    controllers.entry(UNIFIED.to_owned()).or_insert_with(|| PathBuf::from(point));
                }
                Some("cgroup") => {
                    for option in tail.nth(1).unwrap_or_default().split(',') {
                        controllers.entry(option.to_owned()).or_insert_with(|| PathBuf::from(point));
                    }
                }
                _ => {}
            }
        }
        Self::V1(controllers)
    }

    /// What the cgroup uses; zeros for files that are gone. `files` are its open ones.
    pub fn usage(&self, cgroup: &str, files: &CgroupFiles) -> CgroupUsage {
        let (directory, open) = (directory(cgroup), RefCell::new(files.of(cgroup)));
        let read = |controller: &str, file: &str| self.read_open(controller, &directory, file, &open);
        match self {
            Self::V1(_) => stats::usage_v1(&read),
            Self::V2(_) => stats::usage_v2(&read),
        }
    }

    /// What only metrics need of the cgroup; zeros for files that are gone. `files` are its open ones, `page_sizes` what
    /// [`Self::page_sizes`] gives.
    pub fn details(&self, cgroup: &str, files: &CgroupFiles, page_sizes: &[String]) -> CgroupDetails {
        let (directory, open) = (directory(cgroup), RefCell::new(files.of(cgroup)));
        let read = |controller: &str, file: &str| self.read_open(controller, &directory, file, &open);
        match self {
            Self::V1(_) => stats::details_v1(&read, page_sizes),
            Self::V2(_) => stats::details_v2(&read, page_sizes),
        }
    }

    /// The processes directly in the cgroup.
    pub fn processes(&self, cgroup: &str) -> Vec<i32> {
        let controller = if self.root("pids").is_some() { "pids" } else { "memory" };
        let text = self.read(controller, &directory(cgroup), "cgroup.procs");
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// Whether the cgroup is there.
    pub fn exists(&self, cgroup: &str) -> bool {
        let directory = directory(cgroup);
        ["cpuacct", "memory", "pids"]
            .into_iter()
            .filter_map(|controller| self.root(controller))
            .any(|root| root.join(&directory).is_dir())
    }

    /// How many processes of the cgroup the kernel killed for memory.
    pub fn oom_kills(&self, cgroup: &str) -> u64 {
        let directory = directory(cgroup);
        match self {
            Self::V1(_) => stats::oom_kills(&self.read("memory", &directory, "memory.oom_control")),
            Self::V2(_) => stats::oom_kills(&self.read("", &directory, "memory.events")),
        }
    }

    /// Watches for kills for memory in a cgroup of version 1, whose count goes with it.
    pub fn watch_kills(&self, cgroup: &str) -> Option<OomWatch> {
        let Self::V1(controllers) = self else { return None };
        let memory = controllers.get("memory")?.join(directory(cgroup));
        let v1 = BTreeMap::from([("memory".to_owned(), memory)]);
        Paths { v1, ..Paths::default() }.oom_watch().ok()
    }

    /// Whether a file exists in the root of a controller.
    pub fn root_has(&self, controller: &str, file: &str) -> bool {
        self.root(controller).is_some_and(|root| root.join(file).exists())
    }

    /// The sizes of huge pages that are counted, as in `2MB`.
    pub fn page_sizes(&self) -> Vec<String> {
        let counted = match self {
            Self::V1(controllers) => controllers.contains_key("hugetlb"),
            Self::V2(root) => {
                let enabled = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
                enabled.split_ascii_whitespace().any(|controller| controller == "hugetlb")
            }
        };
        let pools = if counted { std::fs::read_dir("/sys/kernel/mm/hugepages").ok() } else { None };
        pools
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|pool| page_size(&pool.file_name().to_string_lossy()))
            .collect()
    }

    /// The directory of a controller.
    fn root(&self, controller: &str) -> Option<&Path> {
        match self {
            Self::V1(controllers) => controllers.get(controller).map(PathBuf::as_path),
            Self::V2(root) => Some(root),
        }
    }

    fn read_open(
        &self,
        controller: &str,
        directory: &Path,
        file: &str,
        open: &RefCell<MutexGuard<'_, Open>>,
    ) -> String {
        let root = self.root(controller);
        root.map_or_else(String::new, |root| open.borrow_mut().text(controller, file, root, directory))
    }

    fn read(&self, controller: &str, directory: &Path, file: &str) -> String {
        let Some(root) = self.root(controller) else { return String::new() };
        kernel_text(&root.join(directory).join(file))
    }
}

/// Where cgroup hierarchies of either version are mounted, all of them: on a hybrid node a process is in a cgroup of each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roots(Vec<PathBuf>);

/// Between two looks at a cgroup whose processes are ending.
const PAUSE: Duration = Duration::from_millis(2);

impl Roots {
    /// Reads them from the text of `/proc/self/mountinfo`.
    pub fn from_mountinfo(mountinfo: &str) -> Self {
        let points = mountinfo.lines().filter_map(|line| {
            let (head, tail) = line.split_once(" - ")?;
            matches!(tail.split(' ').next()?, "cgroup" | "cgroup2").then(|| head.split(' ').nth(4))?
        });
        Self(points.map(PathBuf::from).collect())
    }

    /// Kills whatever is in a cgroup and below it, and removes it from every hierarchy. None is fine. Blocks.
    pub fn clear(&self, cgroup: &str, patience: Duration) -> Result<(), RuntimeError> {
        let below = cgroup.trim_start_matches('/');
        // A path that could mean a hierarchy's root, or lead out of it, names no cgroup of ours.
        if below.is_empty() || Path::new(below).components().any(|part| !matches!(part, Component::Normal(_)))
        {
            let problem = format!("{cgroup:?} names no cgroup of a container");
            return Err(RuntimeError::Invalid { field: "linux.cgroup_parent", problem });
        }
        let begun = Instant::now();
        let mut left: Vec<PathBuf> = self.0.iter().map(|root| root.join(below)).collect();
        loop {
            // Removed first: nearly always nothing is in it any more.
            left.retain(|directory| !removed(directory));
            let Some(first) = left.first() else { return Ok(()) };
            if begun.elapsed() > patience {
                let what = format!("removing cgroup {}", first.display());
                return Err(RuntimeError::Deadline { what, seconds: patience.as_secs() });
            }
            for directory in &left {
                kill_in(directory, below);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// Removes a cgroup with those below it; says whether it is gone.
fn removed(directory: &Path) -> bool {
    use std::io::ErrorKind::{InvalidInput, NotADirectory, NotFound};
    match std::fs::remove_dir(directory) {
        Ok(()) => return true,
        // Also where none can be: below a file, or with a zero byte in its name.
        Err(error) if matches!(error.kind(), NotFound | NotADirectory | InvalidInput) => return true,
        Err(_) => {}
    }
    for below in children(directory) {
        removed(&below);
    }
    std::fs::remove_dir(directory).is_ok()
}

fn kill_in(directory: &Path, cgroup: &str) {
    for below in children(directory) {
        kill_in(&below, cgroup);
    }
    let list = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    for pid in list.lines().filter_map(|line| line.parse::<u32>().ok()) {
        let Some(process) =
            process::start_time(pid).and_then(|began| process::open(pid, began).ok()).flatten()
        else {
            continue;
        };
        // Looked at once more now that the descriptor is held: the id may have changed hands since the list was read.
        let place = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if place.contains(cgroup) && process::kill(&process).is_err() {
            tracing::warn!(pid, cgroup, "a process cannot be killed");
        }
    }
}

fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// A cgroup below a controller's directory.
fn directory(cgroup: &str) -> PathBuf {
    PathBuf::from(cgroup.trim_start_matches('/'))
}

/// `hugepages-2048kB` as cgroup files are named: `2MB`.
fn page_size(pool: &str) -> Option<String> {
    let kilobytes: u64 = pool.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    Some(match kilobytes {
        size if size >= 1 << 20 => format!("{}GB", size >> 20),
        size if size >= 1 << 10 => format!("{}MB", size >> 10),
        size => format!("{size}KB"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hybrid_node_counts_as_version_1() {
        let text = "30 1 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
            32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let Hierarchies::V1(found) = Hierarchies::from_mountinfo(text) else { panic!("version 1") };
        assert_eq!(found["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found["unified"], Path::new("/sys/fs/cgroup/unified"));
        let text = "31 30 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(Hierarchies::from_mountinfo(text), Hierarchies::V2("/sys/fs/cgroup".into()));
    }

    #[test]
    fn every_hierarchy_of_a_hybrid_node_is_cleared_and_no_path_leads_out() {
        let text = "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
            32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
            33 30 0:29 / /dev/shm rw - tmpfs tmpfs rw\n";
        let roots = Roots::from_mountinfo(text);
        assert_eq!(roots.0, [Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup/unified")]);
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("pod/c1/init")).unwrap();
        let roots = Roots(vec![directory.path().to_owned(), "/nowhere".into()]);
        roots.clear("/pod/c1", Duration::ZERO).unwrap();
        roots.clear("/pod/c1", Duration::ZERO).unwrap();
        assert!(directory.path().join("pod").is_dir());
        std::fs::write(directory.path().join("tasks"), "").unwrap();
        for nowhere in ["/tasks/c1", "/a\0b/c1"] {
            roots.clear(nowhere, Duration::ZERO).unwrap();
        }
        for path in ["/", "", "/pod/../.."] {
            assert!(roots.clear(path, Duration::ZERO).is_err(), "{path:?}");
        }
    }

    #[test]
    fn pools_of_huge_pages_are_named_as_the_kernel_names_files() {
        assert_eq!(page_size("hugepages-2048kB").as_deref(), Some("2MB"));
        assert_eq!(page_size("hugepages-1048576kB").as_deref(), Some("1GB"));
        assert_eq!(page_size("hugepages-64kB").as_deref(), Some("64KB"));
        assert_eq!(page_size("other"), None);
    }
}
