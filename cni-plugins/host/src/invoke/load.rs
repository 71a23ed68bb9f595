//! Finds the network a runtime uses: the first usable file of a configuration directory.

use std::{
    io,
    path::{Path, PathBuf},
};

use cni_plugins_types::{NetworkConfigList, config::ConfigError};

/// Why no network is configured.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The directory cannot be listed.
    #[error("cannot list CNI configuration directory {}", path.display())]
    List {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory is missing or has no configuration file; the runtime's message while it waits
    /// for a network plugin.
    #[error("cni plugin not initialized: no network config found in {}", path.display())]
    NoConfig {
        /// The directory.
        path: PathBuf,
    },
    /// The first file cannot be read.
    #[error("cannot read CNI configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The first file is not a valid configuration. The next one is not tried: silently using another
    /// network than the one meant would be worse than none.
    #[error("invalid CNI configuration {}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ConfigError,
    },
}

/// Loads the lexically first `*.conflist`, `*.conf` or `*.json` of `conf_dir`.
pub fn load(conf_dir: &Path) -> Result<NetworkConfigList, LoadError> {
    let no_config = || LoadError::NoConfig { path: conf_dir.to_owned() };
    let list_error = |source| LoadError::List { path: conf_dir.to_owned(), source };
    let entries = match std::fs::read_dir(conf_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(no_config()),
        entries => entries.map_err(list_error)?,
    };
    let mut first: Option<PathBuf> = None;
    for entry in entries {
        let path = entry.map_err(list_error)?.path();
        let wanted = path.extension().is_some_and(|ext| ext == "conflist" || ext == "conf" || ext == "json");
        if wanted && first.as_ref().is_none_or(|first| path < *first) {
            first = Some(path);
        }
    }
    let path = first.ok_or_else(no_config)?;
    let text =
        std::fs::read_to_string(&path).map_err(|source| LoadError::Read { path: path.clone(), source })?;
    NetworkConfigList::parse(&text).map_err(|source| LoadError::Invalid { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_first_by_name_and_ignores_other_files() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(dir.path()), Err(LoadError::NoConfig { .. })));
        std::fs::write(dir.path().join("00-notes.txt"), "x").unwrap();
        std::fs::write(dir.path().join("05-tmp.conflist.tmp"), "x").unwrap();
        std::fs::write(dir.path().join("20-b.conf"), r#"{"cniVersion":"1.0.0","name":"b","type":"p"}"#)
            .unwrap();
        assert_eq!(load(dir.path()).unwrap().name, "b");
        let list = r#"{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"p"}]}"#;
        std::fs::write(dir.path().join("10-a.conflist"), list).unwrap();
        assert_eq!(load(dir.path()).unwrap().name, "a");
    }

    #[test]
    fn an_invalid_first_file_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("10-a.conf"), "{").unwrap();
        let error = load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("10-a.conf"), "{error}");
    }
}
