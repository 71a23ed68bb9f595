//! The option words of a mount, as mount(8) and runtimes know them, sorted into what the kernel takes separately.

use crate::error::Error;

/// Attributes of a mount as `mount_setattr` and `fsmount` number them.
pub(crate) mod attr {
    pub(crate) const RDONLY: u64 = 0x1;
    pub(crate) const NOSUID: u64 = 0x2;
    pub(crate) const NODEV: u64 = 0x4;
    pub(crate) const NOEXEC: u64 = 0x8;
    /// Mask of the three exclusive ways to keep access times; relatime is 0.
    pub(crate) const ATIME: u64 = 0x70;
    pub(crate) const NOATIME: u64 = 0x10;
    pub(crate) const STRICTATIME: u64 = 0x20;
    pub(crate) const NODIRATIME: u64 = 0x80;
    pub(crate) const IDMAP: u64 = 0x10_0000;
    pub(crate) const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// Propagation types as `mount_setattr` takes them.
pub(crate) mod propagation {
    pub(crate) const UNBINDABLE: u64 = 1 << 17;
    pub(crate) const PRIVATE: u64 = 1 << 18;
    pub(crate) const SLAVE: u64 = 1 << 19;
    pub(crate) const SHARED: u64 = 1 << 20;
}

/// Attributes to set and to clear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) set: u64,
    pub(crate) clear: u64,
}

impl Change {
    /// Later words win over earlier ones.
    fn add(&mut self, set: u64, clear: u64) {
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !set) | clear;
    }

    /// Whether anything changes.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// All options of one mount.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// A bind mount; `Some(true)` with everything below the source.
    pub(crate) bind: Option<bool>,
    /// For the mount itself.
    pub(crate) change: Change,
    /// For it and all below it.
    pub(crate) recursive: Change,
    /// In their order: type, and whether for all below too.
    pub(crate) propagation: Vec<(u64, bool)>,
    /// Map owners by the mount's id mappings; `Some(true)` for all below too.
    pub(crate) idmap: Option<bool>,
    /// Parameters of the file system.
    pub(crate) parameters: Vec<(String, Option<String>)>,
}

/// Sorts the words. `field` names the list in errors.
pub(crate) fn parse(words: &[String], field: &str) -> Result<Options, Error> {
    let mut options = Options::default();
    for word in words {
        if let Some((set, clear)) = attribute(word) {
            options.change.add(set, clear);
        } else if let Some((set, clear)) = word.strip_prefix('r').and_then(attribute)
            && recursive_word(word)
        {
            options.recursive.add(set, clear);
        } else if let Some(kind) = propagation_type(word) {
            options.propagation.push((kind, false));
        } else if let Some(kind) = word.strip_prefix('r').and_then(propagation_type) {
            options.propagation.push((kind, true));
        } else {
            match word.as_str() {
                "" | "defaults" | "async" | "nomand" | "loud" | "nolazytime" | "noiversion" => {}
                "bind" => options.bind = options.bind.or(Some(false)),
                "rbind" => options.bind = Some(true),
                "idmap" => options.idmap = options.idmap.or(Some(false)),
                "ridmap" => options.idmap = Some(true),
                "remount" | "tmpcopyup" => {
                    return Err(Error::spec(field, format!("option {word:?} is not offered")));
                }
                _ => options.parameters.push(match word.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (word.clone(), None),
                }),
            }
        }
    }
    Ok(options)
}

/// `relatime` is a word of its own and not the recursive form of something.
fn recursive_word(word: &str) -> bool {
    word != "relatime"
}

/// What a word sets and clears.
fn attribute(word: &str) -> Option<(u64, u64)> {
    Some(match word {
        "ro" => (attr::RDONLY, 0),
        "rw" => (0, attr::RDONLY),
        "nosuid" => (attr::NOSUID, 0),
        "suid" => (0, attr::NOSUID),
        "nodev" => (attr::NODEV, 0),
        "dev" => (0, attr::NODEV),
        "noexec" => (attr::NOEXEC, 0),
        "exec" => (0, attr::NOEXEC),
        "nodiratime" => (attr::NODIRATIME, 0),
        "diratime" => (0, attr::NODIRATIME),
        "noatime" => (attr::NOATIME, attr::ATIME & !attr::NOATIME),
        "strictatime" => (attr::STRICTATIME, attr::ATIME & !attr::STRICTATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (0, attr::ATIME),
        "nosymfollow" => (attr::NOSYMFOLLOW, 0),
        "symfollow" => (0, attr::NOSYMFOLLOW),
        _ => return None,
    })
}

fn propagation_type(word: &str) -> Option<u64> {
    Some(match word {
        "shared" => propagation::SHARED,
        "slave" => propagation::SLAVE,
        "private" => propagation::PRIVATE,
        "unbindable" => propagation::UNBINDABLE,
        _ => return None,
    })
}

/// `linux.rootfsPropagation` as a type; recursion is implied or without effect.
pub(crate) fn root_propagation(word: &str) -> Result<u64, Error> {
    match word {
        "" => Ok(propagation::SLAVE),
        _ => propagation_type(word).or_else(|| word.strip_prefix('r').and_then(propagation_type)).ok_or_else(
            || Error::spec("linux.rootfsPropagation", format!("{word:?} is not a propagation type")),
        ),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(words: &[&str]) -> Options {
        parse(&words.iter().map(ToString::to_string).collect::<Vec<_>>(), "mounts[0].options").unwrap()
    }

    #[test]
    fn a_volume_of_the_kubelet() {
        let got = options(&["rbind", "rprivate", "ro"]);
        assert_eq!(got.bind, Some(true));
        assert_eq!(got.change, Change { set: attr::RDONLY, clear: 0 });
        assert_eq!(got.propagation, [(propagation::PRIVATE, true)]);
        assert!(got.recursive.is_empty() && got.parameters.is_empty());
    }

    #[test]
    fn file_system_parameters_stay_in_order() {
        let got = options(&["nosuid", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]);
        assert_eq!(got.change.set, attr::NOSUID);
        let value = |v: &str| Some(v.to_owned());
        assert_eq!(
            got.parameters,
            [
                ("newinstance".to_owned(), None),
                ("ptmxmode".to_owned(), value("0666")),
                ("mode".to_owned(), value("0620")),
                ("gid".to_owned(), value("5")),
            ]
        );
    }

    #[test]
    fn recursive_words_and_their_plain_look_alikes() {
        let got = options(&["rro", "rnosuid", "relatime", "rrelatime", "rw"]);
        assert_eq!(got.recursive.set, attr::RDONLY | attr::NOSUID);
        assert_eq!(got.recursive.clear, attr::ATIME);
        assert_eq!(got.change, Change { set: 0, clear: attr::ATIME | attr::RDONLY });
        assert_eq!(options(&["rslave", "slave"]).propagation.len(), 2);
    }

    #[test]
    fn what_is_not_offered_is_refused_by_name() {
        let error = parse(&["tmpcopyup".to_owned()], "mounts[3].options").unwrap_err();
        assert_eq!(error.to_string(), "mounts[3].options: option \"tmpcopyup\" is not offered");
        assert!(root_propagation("rshared").is_ok());
        assert!(root_propagation("sideways").is_err());
    }

    proptest! {
        /// A bit is never both set and cleared, and the last word of a pair decides.
        #[test]
        fn the_last_word_wins(words in prop::collection::vec(prop::sample::select(vec![
            "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "relatime", "strictatime",
        ]), 0..12)) {
            let got = options(&words);
            prop_assert_eq!(got.change.set & got.change.clear, 0);
            let last = words.iter().rev().find(|word| matches!(**word, "ro" | "rw"));
            prop_assert_eq!(got.change.set & attr::RDONLY != 0, last == Some(&"ro"));
        }
    }
}
