//! Keys: made, written as people write them, and kept in a file that only root reads.

use std::{
    fmt,
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    str::FromStr,
};

use base64::{Engine, engine::general_purpose::STANDARD};

/// Bytes of a key.
pub const LENGTH: usize = 32;
/// Only the owner reads and writes.
const PRIVATE: u32 = 0o600;

/// A private, public or preshared key. Never shown by `Debug`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub [u8; LENGTH]);

/// Text that is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a WireGuard key: expected 44 characters of base64 for 32 bytes")]
pub struct InvalidKey;

impl Key {
    /// All zeros: how the kernel says, and is told, that there is none.
    pub const NONE: Self = Self([0; LENGTH]);

    /// A new private key.
    pub fn generate() -> io::Result<Self> {
        let mut bytes = [0; LENGTH];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        // As Curve25519 wants its scalars.
        bytes[0] &= 0xf8;
        bytes[31] = bytes[31] & 0x7f | 0x40;
        Ok(Self(bytes))
    }

    /// The key in a file that somebody else keeps.
    pub fn load(path: &Path) -> io::Result<Self> {
        let told = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let text = fs::read_to_string(path).map_err(told)?;
        text.trim().parse().map_err(|error| told(io::Error::other::<InvalidKey>(error)))
    }

    /// The private key in a file; made, with a file that only root reads, where there is none. A file that others may read
    /// is closed to them. For one caller at a time.
    pub fn load_or_create(path: &Path) -> io::Result<Self> {
        let told = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        match Self::load(path) {
            Ok(key) => {
                if fs::metadata(path).map_err(told)?.permissions().mode() & 0o077 != 0 {
                    fs::set_permissions(path, Permissions::from_mode(PRIVATE)).map_err(told)?;
                }
                Ok(key)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = Self::generate()?;
                key.store(path).map_err(told)?;
                Ok(key)
            }
            Err(error) => Err(error),
        }
    }

    /// On the disk before it is used: with another key after a crash the peers would have to learn a new one.
    fn store(&self, path: &Path) -> io::Result<()> {
        let dir = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(dir)?;
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".new");
        // What a killed call left may have other permissions.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(PRIVATE).open(&temporary)?;
        writeln!(file, "{self}")?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(dir)?.sync_all()
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

impl FromStr for Key {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = STANDARD.decode(text).map_err(|_not_base64| InvalidKey)?;
        bytes.try_into().map(Self).map_err(|_other_length: Vec<u8>| InvalidKey)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_written_as_wg_writes_them_and_never_logged() {
        let text = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        let key: Key = text.parse().unwrap();
        assert_eq!(key.to_string(), text);
        assert_eq!(format!("{key:?}"), "Key(…)");
        for bad in ["", "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8D", "????", "AAAA"] {
            assert_eq!(bad.parse::<Key>(), Err(InvalidKey), "{bad}");
        }
    }

    #[test]
    fn new_keys_differ_and_are_valid_scalars() {
        let (one, two) = (Key::generate().unwrap(), Key::generate().unwrap());
        assert_ne!(one, two);
        assert_eq!((one.0[0] & 7, one.0[31] & 0xc0), (0, 0x40));
    }

    #[test]
    fn a_key_stays_and_only_root_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/wireguard.key");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        let key = Key::load_or_create(&path).unwrap();
        assert_eq!(mode(), 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        assert_eq!(Key::load_or_create(&path).unwrap(), key);
        assert_eq!(mode(), 0o600);
        fs::write(&path, "nonsense\n").unwrap();
        let error = Key::load_or_create(&path).unwrap_err().to_string();
        assert!(error.contains("wireguard.key: not a WireGuard key"), "{error}");
        let error = Key::load(&path).unwrap_err().to_string();
        assert!(error.contains("wireguard.key: not a WireGuard key"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "nonsense\n", "a damaged key is not replaced unasked");
    }
}
