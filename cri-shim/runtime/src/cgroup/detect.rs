//! The hierarchies of this host, and directories in them.

use std::io;
use std::path::{Component, Path, PathBuf};

use crate::error::Error;

/// Where hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// One hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    /// Version 2.
    pub(crate) unified: bool,
    /// Version 1: its controllers, or the one word `name=…`.
    pub(crate) controllers: Vec<String>,
    pub(crate) mountpoint: PathBuf,
    /// The cgroup of this process in it.
    pub(crate) own: PathBuf,
}

/// All mounted ones.
pub(crate) fn hierarchies() -> Result<Vec<Hierarchy>, Error> {
    let text = std::fs::read_to_string("/proc/self/cgroup").map_err(Error::step("read /proc/self/cgroup"))?;
    Ok(of_this_process(&text, Path::new(ROOT), &is_cgroup2))
}

fn is_cgroup2(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| u64::try_from(stat.f_type) == Ok(CGROUP2_MAGIC))
}

/// Finds the mount point of each line `number:controllers:path`.
fn of_this_process(text: &str, root: &Path, is_cgroup2: &dyn Fn(&Path) -> bool) -> Vec<Hierarchy> {
    if is_cgroup2(root) {
        let own = text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
        return vec![Hierarchy {
            unified: true,
            controllers: Vec::new(),
            mountpoint: root.to_owned(),
            own: own.into(),
        }];
    }
    text.lines().filter_map(|line| hierarchy(line, root, is_cgroup2)).collect()
}

fn hierarchy(line: &str, root: &Path, is_cgroup2: &dyn Fn(&Path) -> bool) -> Option<Hierarchy> {
    let mut parts = line.splitn(3, ':');
    let (_, controllers, own) = (parts.next()?, parts.next()?, PathBuf::from(parts.next()?));
    if controllers.is_empty() {
        let mountpoint = root.join("unified");
        return is_cgroup2(&mountpoint).then(|| Hierarchy {
            unified: true,
            controllers: Vec::new(),
            mountpoint,
            own,
        });
    }
    // A joint hierarchy has its directory under the joint name, in either order, and links for its parts.
    let name = controllers.strip_prefix("name=").unwrap_or(controllers);
    let reversed = name.split(',').rev().collect::<Vec<_>>().join(",");
    let mut places = [name, &reversed].into_iter().chain(name.split(',')).map(|name| root.join(name));
    let mountpoint = places.find(|place| place.is_dir())?;
    let controllers = controllers.split(',').map(str::to_owned).collect();
    Some(Hierarchy { unified: false, controllers, mountpoint, own })
}

impl Hierarchy {
    /// The name of its directory below `/sys/fs/cgroup`.
    pub(crate) fn directory_name(&self) -> String {
        self.mountpoint.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    /// The parameters by which it is mounted once more.
    pub(crate) fn mount_parameters(&self) -> Vec<(String, Option<String>)> {
        let named = self.controllers.first().and_then(|first| first.strip_prefix("name="));
        match named {
            Some(name) => vec![("none".to_owned(), None), ("name".to_owned(), Some(name.to_owned()))],
            None => self.controllers.iter().map(|name| (name.clone(), None)).collect(),
        }
    }

    /// The names by which [`super::Paths::v1`] has it.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.controllers.iter().map(String::as_str)
    }

    /// The directory of a cgroup path: below the root when absolute, else below this process's own.
    pub(crate) fn directory(&self, path: &Path) -> Result<PathBuf, Error> {
        let mut directory = self.mountpoint.clone();
        let own = if path.is_absolute() { Path::new("") } else { self.own.as_path() };
        for component in own.components().chain(path.components()) {
            match component {
                Component::Normal(name) => directory.push(name),
                Component::ParentDir => {
                    return Err(Error::spec("linux.cgroupsPath", "leads upwards"));
                }
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        if directory == self.mountpoint {
            return Err(Error::spec("linux.cgroupsPath", "is the root cgroup"));
        }
        Ok(directory)
    }

    /// Makes a directory with all above it, usable: controllers handed down, processors given.
    pub(crate) fn make(&self, directory: &Path) -> Result<(), Error> {
        let below = directory.strip_prefix(&self.mountpoint).unwrap_or(directory);
        let mut here = self.mountpoint.clone();
        for name in below {
            if self.unified {
                hand_down(&here);
            }
            here.push(name);
            match std::fs::create_dir(&here) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other.map_err(Error::step(format!("make the cgroup {}", here.display())))?,
            }
            if self.controllers.iter().any(|name| name == "cpuset") {
                inherit_cpuset(&here)
                    .map_err(Error::step(format!("give processors to the cgroup {}", here.display())))?;
            }
        }
        Ok(())
    }
}

/// Version 2: lets cgroups below have the controllers that this one has. What cannot be handed down shows when a limit
/// of it is set.
fn hand_down(directory: &Path) {
    let read = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap_or_default();
    let (have, given) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    let missing: Vec<String> = have
        .split_whitespace()
        .filter(|name| !given.split_whitespace().any(|given| given == *name))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() {
        return;
    }
    let file = directory.join("cgroup.subtree_control");
    if std::fs::write(&file, missing.join(" ")).is_err() {
        for one in missing {
            let _not_this_one = std::fs::write(&file, one);
        }
    }
}

/// Version 1: a new cpuset is empty and takes no process.
fn inherit_cpuset(directory: &Path) -> io::Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let file = directory.join(name);
        if std::fs::read_to_string(&file)?.trim().is_empty()
            && let Some(parent) = directory.parent()
        {
            std::fs::write(&file, std::fs::read_to_string(parent.join(name))?.trim())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str, directories: &[&str], cgroup2: &'static str) -> Vec<Hierarchy> {
        let root = tempfile::tempdir().unwrap();
        for directory in directories {
            std::fs::create_dir_all(root.path().join(directory)).unwrap();
        }
        let place = root.path().to_owned();
        of_this_process(text, root.path(), &move |path| path == place.join(cgroup2))
    }

    #[test]
    fn a_hybrid_host() {
        let text = "5:name=systemd:/x\n4:cpuacct,cpu:/y\n3:memory:/\n2:rdma:/\n0::/z\n";
        let got = found(text, &["systemd", "cpu,cpuacct", "memory", "unified"], "unified");
        assert_eq!(got.len(), 4);
        assert_eq!(got[0].directory_name(), "systemd");
        assert_eq!(
            got[0].mount_parameters(),
            [("none".to_owned(), None), ("name".to_owned(), Some("systemd".to_owned()))]
        );
        assert_eq!(got[1].directory_name(), "cpu,cpuacct");
        assert_eq!(got[1].keys().collect::<Vec<_>>(), ["cpuacct", "cpu"]);
        assert!(got[3].unified && got[3].own == Path::new("/z"));
    }

    #[test]
    fn a_version_2_host() {
        let got = found("0::/init.scope\n", &[], "");
        assert!(got.len() == 1 && got[0].unified);
        let directory = got[0].directory(Path::new("/a/b")).unwrap();
        assert_eq!(directory, got[0].mountpoint.join("a/b"));
        let directory = got[0].directory(Path::new("a")).unwrap();
        assert_eq!(directory, got[0].mountpoint.join("init.scope/a"));
        assert!(got[0].directory(Path::new("/a/../..")).is_err());
        assert!(got[0].directory(Path::new("/")).is_err());
    }
}
