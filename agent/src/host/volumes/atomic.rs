//! Writes a volume's files so that readers see the old set or the new one, never a mixture.
//!
//! Layout, as upstream's AtomicWriter: the files are in a directory of their own (`..<time>.<n>`), the link `..data`
//! names the current one, and each top-level name is a link through `..data`. An update makes a new directory and
//! swaps `..data` by rename. A writer that was killed leaves directories that the next write removes.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;

use super::ownership::Ownership;
use super::select::{File, Files};
use crate::files::remove;

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Makes `dir` hold exactly `files`; does nothing when it does already.
pub(super) fn write(dir: &Path, files: &Files, ownership: Ownership) -> io::Result<()> {
    files.keys().try_for_each(|path| check(path))?;
    let current = fs::read_link(dir.join(DATA)).ok();
    if let Some(current) = &current
        && holds(&dir.join(current), files, ownership)
    {
        link_names(dir, files)?;
        return remove_stale(dir, files, current);
    }
    let fresh = new_dir(dir)?;
    write_files(&dir.join(&fresh), files, ownership)?;
    link_names(dir, files)?;
    remove(&dir.join(NEW_DATA))?;
    symlink(&fresh, dir.join(NEW_DATA))?;
    fs::rename(dir.join(NEW_DATA), dir.join(DATA))?;
    remove_stale(dir, files, &fresh)
}

/// Paths come from users: relative, without `..`, and not starting with `..`, which names our own files.
fn check(path: &str) -> io::Result<()> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    if !plain || path.is_empty() || path.starts_with("..") || path.len() > 4096 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("invalid path {path:?}")));
    }
    Ok(())
}

/// Whether a data directory has exactly these files with these modes.
fn holds(data: &Path, files: &Files, ownership: Ownership) -> bool {
    let same = |(path, file): (&String, &File)| {
        let path = data.join(path);
        fs::symlink_metadata(&path).is_ok_and(|metadata| {
            metadata.is_file()
                && metadata.mode() & 0o7777 == ownership.file_mode(file.mode)
                && metadata.uid() == file.owner.unwrap_or(metadata.uid())
        }) && fs::read(&path).is_ok_and(|data| data == file.data)
    };
    files.iter().all(same) && count_files(data).is_ok_and(|count| count == files.len())
}

fn count_files(dir: &Path) -> io::Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        count += if entry.file_type()?.is_dir() { count_files(&entry.path())? } else { 1 };
    }
    Ok(count)
}

fn new_dir(dir: &Path) -> io::Result<PathBuf> {
    let time = Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S").to_string();
    for number in 0_u32.. {
        let name = PathBuf::from(format!("..{time}.{number}"));
        match DirBuilder::new().mode(0o755).create(dir.join(&name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| name),
        }
    }
    Err(io::Error::other("no free name for a data directory"))
}

fn write_files(data: &Path, files: &Files, ownership: Ownership) -> io::Result<()> {
    let mut dirs = BTreeSet::from([data.to_owned()]);
    for (path, file) in files {
        let path = data.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
            dirs.extend(parent.ancestors().take_while(|dir| dir.starts_with(data)).map(Path::to_owned));
        }
        let mut handle = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        handle.write_all(&file.data)?;
        if file.owner.is_some() || ownership.group.is_some() {
            chown(&path, file.owner, ownership.group)?;
        }
        handle.set_permissions(PermissionsExt::from_mode(ownership.file_mode(file.mode)))?;
    }
    for dir in dirs {
        if ownership.group.is_some() {
            chown(&dir, None, ownership.group)?;
        }
        fs::set_permissions(&dir, PermissionsExt::from_mode(ownership.dir_mode(0o755)))?;
    }
    Ok(())
}

/// Links each top-level name through `..data`; a name that is a link already stays.
fn link_names(dir: &Path, files: &Files) -> io::Result<()> {
    for name in top_level(files) {
        let target = Path::new(DATA).join(name);
        let link = dir.join(name);
        if fs::read_link(&link).is_ok_and(|current| current == target) {
            continue;
        }
        remove(&link)?;
        symlink(&target, &link)?;
    }
    Ok(())
}

/// Removes links of names that are gone and data directories other than `current`.
fn remove_stale(dir: &Path, files: &Files, current: &Path) -> io::Result<()> {
    let names = top_level(files);
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        if text == DATA || Path::new(&name) == current || names.contains(text.as_ref()) {
            continue;
        }
        if text.starts_with("..") && entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn top_level(files: &Files) -> BTreeSet<&str> {
    files.keys().map(|path| path.split('/').next().unwrap_or(path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str)]) -> Files {
        let file = |data: &str| File { data: data.as_bytes().to_vec(), mode: 0o640, owner: None };
        list.iter().map(|(path, data)| ((*path).to_owned(), file(data))).collect()
    }

    fn entries(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.retain(|name| !name.starts_with("..2"));
        names.sort();
        names
    }

    fn put(dir: &Path, list: &[(&str, &str)]) -> PathBuf {
        write(dir, &files(list), Ownership::default()).unwrap();
        fs::read_link(dir.join(DATA)).unwrap()
    }

    #[test]
    fn updates_swap_the_whole_set() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let first = put(dir, &[("a", "1"), ("sub/b", "2")]);
        assert_eq!(fs::read_to_string(dir.join("sub/b")).unwrap(), "2");
        assert_eq!(fs::metadata(dir.join("a")).unwrap().mode() & 0o777, 0o640);
        let same = put(dir, &[("a", "1"), ("sub/b", "2")]);
        assert_eq!(first, same, "unchanged content is not written again");
        let second = put(dir, &[("a", "3"), ("c", "4")]);
        assert_ne!(first, second);
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "3");
        assert_eq!(entries(dir), ["..data", "a", "c"]);
        assert!(!dir.join(first).exists());
    }

    #[test]
    fn what_a_killed_writer_left_is_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        fs::create_dir(dir.join("..2020_01_01_00_00_00.0")).unwrap();
        symlink("nowhere", dir.join(NEW_DATA)).unwrap();
        put(dir, &[("a", "1")]);
        assert_eq!(entries(dir), ["..data", "a"]);
        assert!(!dir.join("..2020_01_01_00_00_00.0").exists());
    }

    #[test]
    fn a_mode_change_alone_is_an_update() {
        let dir = tempfile::tempdir().unwrap();
        let first = put(dir.path(), &[("a", "1")]);
        let mut changed = files(&[("a", "1")]);
        changed.get_mut("a").unwrap().mode = 0o600;
        write(dir.path(), &changed, Ownership::default()).unwrap();
        assert_ne!(fs::read_link(dir.path().join(DATA)).unwrap(), first);
    }

    #[test]
    fn paths_cannot_leave_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["../x", "/x", "a/../../x", "..x", "", "a/.."] {
            assert!(write(dir.path(), &files(&[(path, "1")]), Ownership::default()).is_err(), "{path}");
        }
    }
}
