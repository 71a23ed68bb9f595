//! Reads a tar stream: one header and its extensions at a time, with bounds on everything that is kept in memory.
//!
//! Input: the uncompressed stream. Output: [`Header`]s, each followed by its content. Understood are v7, ustar, PAX and GNU
//! archives as Go's reader takes them, since that is what layers are made for. It does nothing with what it reads.
//! Formats: <https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html>, GNU tar's manual, appendix D.

use std::io::{self, Read};

/// Bytes of a block.
const BLOCK: usize = 512;

/// Most bytes of one extension header, as in Go's reader; no path or attribute is longer.
const MAX_EXTENSION: u64 = 1 << 20;

/// Prefix of PAX records that are extended attributes.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Another name of an earlier entry.
    Hardlink,
    /// A character device with its numbers.
    Character(u32, u32),
    /// A block device with its numbers.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
    /// A file with holes, in any of GNU's forms; its content is not laid out here.
    Sparse,
    /// Something else, by its letter.
    Other(u8),
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its path, as written.
    pub path: Vec<u8>,
    /// What it leads to, for links.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permissions, with the set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds and nanoseconds since 1970.
    pub modified: (i64, u32),
    /// Bytes of content in the stream.
    pub size: u64,
    /// Bytes that it takes unpacked, also where those of the stream are fewer.
    pub real_size: u64,
    /// Extended attributes in the order given.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tar stream being read.
pub struct TarReader<R> {
    reader: R,
    /// Bytes of the current entry's content that were not read yet, and the padding behind.
    left: u64,
    padding: u64,
}

#[derive(Default)]
struct Extensions {
    pax: Vec<(Vec<u8>, Vec<u8>)>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Extensions {
    fn pax(&self, key: &str) -> Option<&[u8]> {
        // The last one counts.
        self.pax.iter().rev().find(|(name, _)| name == key.as_bytes()).map(|(_, value)| value.as_slice())
    }

    fn number<T: std::str::FromStr>(&self, key: &str) -> io::Result<Option<T>> {
        let Some(value) = self.pax(key).filter(|value| !value.is_empty()) else { return Ok(None) };
        let number = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
        number.map(Some).ok_or_else(|| damaged(format!("PAX record {key} is no number")))
    }
}

impl<R: Read> TarReader<R> {
    /// Reads the stream from its beginning.
    pub fn new(reader: R) -> Self {
        Self { reader, left: 0, padding: 0 }
    }

    /// Gives the reader back, wherever it is.
    pub fn into_inner(self) -> R {
        self.reader
    }

    /// The reader, for who knows what it does beside reading.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.reader
    }

    /// The next entry; what was not read of the one before is skipped. `None` at the end of the archive.
    pub fn next_entry(&mut self) -> io::Result<Option<Header>> {
        let mut extensions = Extensions::default();
        loop {
            self.skip_rest()?;
            let Some(block) = self.block()? else { return Ok(None) };
            let raw = tar::Header::from_byte_slice(&block);
            check(raw)?;
            let stored = size(raw)?;
            match raw.entry_type().as_byte() {
                b'x' => extensions.pax = records(&self.extension(stored)?)?,
                b'L' => extensions.long_name = Some(text(self.extension(stored)?)),
                b'K' => extensions.long_link = Some(text(self.extension(stored)?)),
                // Records for all that follows, which nobody heeds.
                b'g' => self.content(stored),
                _ => {
                    let header = header(raw, stored, &extensions)?;
                    self.content(header.size);
                    return Ok(Some(header));
                }
            }
        }
    }

    /// Reads some of the current entry's content; 0 at its end.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let count = self.reader.read(&mut buffer[..most])?;
        if count == 0 {
            return Err(truncated());
        }
        self.left -= count as u64;
        Ok(count)
    }

    fn content(&mut self, size: u64) {
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn skip_rest(&mut self) -> io::Result<()> {
        let rest = self.left + self.padding;
        let skipped = io::copy(&mut self.reader.by_ref().take(rest), &mut io::sink())?;
        (self.left, self.padding) = (0, 0);
        // A missing padding at the very end is common and harmless.
        if skipped < rest && skipped + (BLOCK as u64) <= rest { Err(truncated()) } else { Ok(()) }
    }

    /// The next block that is not all zero.
    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        match super::super::archive::read_up_to(&mut self.reader, &mut block)? {
            0 => return Ok(None),
            BLOCK => {}
            _ => return Err(truncated()),
        }
        if block.iter().any(|byte| *byte != 0) {
            return Ok(Some(block));
        }
        match super::super::archive::read_up_to(&mut self.reader, &mut block)? {
            BLOCK if block.iter().any(|byte| *byte != 0) => {
                Err(damaged("an entry after the first half of the end marker"))
            }
            _ => Ok(None),
        }
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(damaged(format!("an extension header of {size} bytes")));
        }
        self.content(size);
        let mut bytes = Vec::new();
        self.reader.by_ref().take(size).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return Err(truncated());
        }
        self.left = 0;
        Ok(bytes)
    }
}

/// Reads PAX records: `length key=value\n`, where the length counts itself.
pub fn records(mut bytes: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let wrong = || damaged("a malformed PAX record");
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let space = bytes.iter().take(20).position(|byte| *byte == b' ').ok_or_else(wrong)?;
        let length = std::str::from_utf8(&bytes[..space]).ok().and_then(|text| text.parse::<usize>().ok());
        let length =
            length.filter(|length| *length > space + 1 && *length <= bytes.len()).ok_or_else(wrong)?;
        let (record, rest) = bytes.split_at(length);
        let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(wrong)?;
        let equals = record.iter().position(|byte| *byte == b'=').filter(|at| *at > 0).ok_or_else(wrong)?;
        found.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = rest;
    }
    Ok(found)
}

fn check(raw: &tar::Header) -> io::Result<()> {
    let bytes = raw.as_bytes();
    let summed = || bytes[..148].iter().chain(&bytes[156..]);
    let sum = summed().map(|byte| i64::from(*byte)).sum::<i64>() + 8 * 32;
    // Some old archivers took bytes for signed.
    let signed = summed().map(|byte| i64::from(byte.cast_signed())).sum::<i64>() + 8 * 32;
    match number(&raw.as_old().cksum) {
        Some(promised) if promised == sum || promised == signed => Ok(()),
        _ => Err(damaged("a header with a wrong checksum")),
    }
}

/// A numeric field: octal digits between blanks and zero bytes, none at all for 0, or GNU's big-endian form.
fn number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let (start, filler, top) = if first & 0x40 == 0 { (0, 0, first & 0x7f) } else { (-1, 0xff, *first) };
        let bytes = std::iter::once(top).chain(rest.iter().copied());
        let add = |number: i64, byte| number.checked_mul(256)?.checked_add(i64::from(byte));
        return bytes.skip_while(|byte| *byte == filler).try_fold(start, add);
    }
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let digits: Vec<u8> = field.iter().copied().skip_while(blank).take_while(|byte| !blank(byte)).collect();
    if digits.is_empty() {
        return Some(0);
    }
    i64::from_str_radix(std::str::from_utf8(&digits).ok()?, 8).ok().filter(|number| *number >= 0)
}

fn unsigned(field: &[u8], what: &str) -> io::Result<u64> {
    let found = number(field).and_then(|number| u64::try_from(number).ok());
    found.ok_or_else(|| damaged(format!("a {what} that is no number")))
}

fn size(raw: &tar::Header) -> io::Result<u64> {
    unsigned(&raw.as_old().size, "size")
}

fn header(raw: &tar::Header, stored: u64, extensions: &Extensions) -> io::Result<Header> {
    let given = |long: &Option<Vec<u8>>, key, short: Vec<u8>| {
        let pax = || extensions.pax(key).filter(|value| !value.is_empty()).map(<[u8]>::to_vec);
        long.clone().or_else(pax).unwrap_or(short)
    };
    let path = given(&extensions.long_name, "path", raw.path_bytes().into_owned());
    let link = raw.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default();
    let link = given(&extensions.long_link, "linkpath", link);
    if path.contains(&0) || link.contains(&0) {
        return Err(damaged("a path with a zero byte"));
    }
    let device = || -> io::Result<(u32, u32)> {
        // Both newer forms have them in the same place.
        let Some(fields) = raw
            .as_ustar()
            .map(|all| (all.dev_major, all.dev_minor))
            .or_else(|| raw.as_gnu().map(|all| (all.dev_major, all.dev_minor)))
        else {
            return Ok((0, 0));
        };
        let small = |field: &[u8]| {
            u32::try_from(unsigned(field, "device number")?)
                .map_err(|_large| damaged("a device number beyond 32 bits"))
        };
        Ok((small(&fields.0)?, small(&fields.1)?))
    };
    let sparse = extensions.pax.iter().any(|(key, _)| key.starts_with(b"GNU.sparse."));
    let kind = match raw.entry_type().as_byte() {
        0 if path.last() == Some(&b'/') => Kind::Directory,
        0 | b'0' if sparse => Kind::Sparse,
        0 | b'0' => Kind::File,
        b'1' => Kind::Hardlink,
        b'2' => Kind::Symlink,
        b'3' => device().map(|(major, minor)| Kind::Character(major, minor))?,
        b'4' => device().map(|(major, minor)| Kind::Block(major, minor))?,
        b'5' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'S' => Kind::Sparse,
        other => Kind::Other(other),
    };
    let stored = extensions.number("size")?.unwrap_or(stored);
    let size = match kind {
        Kind::File | Kind::Sparse | Kind::Other(_) => stored,
        // Whatever the field says, nothing follows.
        _ => 0,
    };
    let mut real_size = size;
    if kind == Kind::Sparse {
        for key in ["GNU.sparse.size", "GNU.sparse.realsize"] {
            real_size = real_size.max(extensions.number(key)?.unwrap_or(0));
        }
        if let Some(gnu) = raw.as_gnu().filter(|_| raw.entry_type().as_byte() == b'S') {
            real_size = real_size.max(unsigned(&gnu.realsize, "real size")?);
        }
    }
    let id = |number: u64| u32::try_from(number).map_err(|_large| damaged("an owner beyond 32 bits"));
    let owner = |key, plain: u64| id(extensions.number(key)?.unwrap_or(plain));
    let xattrs = extensions.pax.iter().filter_map(|(key, value)| {
        Some((key.strip_prefix(XATTR).filter(|name| !name.is_empty())?.to_vec(), value.clone()))
    });
    Ok(Header {
        kind,
        mode: u32::try_from(unsigned(&raw.as_old().mode, "mode")? & 0o7777).unwrap_or(0),
        uid: owner("uid", unsigned(&raw.as_old().uid, "uid")?)?,
        gid: owner("gid", unsigned(&raw.as_old().gid, "gid")?)?,
        modified: modified(raw, extensions)?,
        size,
        real_size,
        xattrs: xattrs.collect(),
        path,
        link,
    })
}

/// A time that cannot be stored becomes 1970, as with containerd.
fn modified(raw: &tar::Header, extensions: &Extensions) -> io::Result<(i64, u32)> {
    /// The last second whose nanoseconds fit 64 bits.
    const LAST: i64 = i64::MAX / 1_000_000_000;
    let (seconds, nanoseconds) = match extensions.pax("mtime").filter(|value| !value.is_empty()) {
        Some(value) => time(value).ok_or_else(|| damaged("PAX record mtime is no time"))?,
        None => (number(&raw.as_old().mtime).ok_or_else(|| damaged("a time that is no number"))?, 0),
    };
    Ok(if (0..LAST).contains(&seconds) { (seconds, nanoseconds) } else { (0, 0) })
}

fn time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    Some((whole.parse().ok()?, digits.parse().ok()?))
}

/// Up to the first zero byte.
fn text(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn damaged(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("damaged tar archive: {}", what.into()))
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "damaged tar archive: it ends too early")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> io::Result<Vec<(Header, Vec<u8>)>> {
        let mut reader = TarReader::new(bytes);
        let mut found = Vec::new();
        while let Some(header) = reader.next_entry()? {
            let (mut content, mut buffer) = (Vec::new(), [0; 700]);
            loop {
                match reader.read(&mut buffer)? {
                    0 => break,
                    count => content.extend_from_slice(&buffer[..count]),
                }
            }
            found.push((header, content));
        }
        Ok(found)
    }

    fn archive() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let pax: [(&str, &[u8]); 3] =
            [("mtime", b"12.5"), ("SCHILY.xattr.user.a", b"v\n="), ("uid", b"4000000")];
        builder.append_pax_extensions(pax).expect("appended");
        let mut header = tar::Header::new_ustar();
        header.set_size(3);
        header.set_mode(0o104_755);
        builder.append_data(&mut header, "a/file", &b"abc"[..]).expect("appended");
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        header.set_entry_type(tar::EntryType::Symlink);
        builder.append_link(&mut header, "l".repeat(150), "t".repeat(200)).expect("appended");
        builder.into_inner().expect("finished")
    }

    #[test]
    fn reads_extensions_contents_and_long_names() {
        let found = read(&archive()).expect("read");
        let (file, content) = &found[0];
        assert_eq!(
            (file.path.as_slice(), content.as_slice(), file.kind),
            (&b"a/file"[..], &b"abc"[..], Kind::File)
        );
        assert_eq!((file.uid, file.modified, file.mode), (4_000_000, (12, 500_000_000), 0o4755));
        assert_eq!(file.xattrs, [(b"user.a".to_vec(), b"v\n=".to_vec())]);
        let (link, _) = &found[1];
        assert_eq!((link.path.len(), link.link.len(), link.kind), (150, 200, Kind::Symlink));
        assert!(link.xattrs.is_empty(), "records are for one entry only");
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let whole = archive();
        for cut in [1, 511, 513, 1500, 1537] {
            read(&whole[..cut]).expect_err("cut off");
        }
        for (at, byte) in (0..whole.len().min(4096)).map(|at| (at, whole[at])) {
            let mut other = whole.clone();
            other[at] = byte ^ 0xff;
            drop(read(&other));
        }
        for text in ["5", "99 a=b\n", "6 a=b", "5 =b\n", " a=b\n", "x a=b\n"] {
            records(text.as_bytes()).expect_err("malformed");
        }
        assert_eq!(records(b"6 a=b\n").expect("one"), [(b"a".to_vec(), b"b".to_vec())]);
    }

    #[test]
    fn an_extension_header_is_bounded() {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_size(MAX_EXTENSION + 1);
        header.set_cksum();
        let error = read(header.as_bytes()).expect_err("too long").to_string();
        assert!(error.contains("1048577"), "{error}");
    }

    #[test]
    fn a_sparse_file_tells_its_real_size() {
        let mut builder = tar::Builder::new(Vec::new());
        let pax: [(&str, &[u8]); 2] = [("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"1099511627776")];
        builder.append_pax_extensions(pax).expect("appended");
        let mut header = tar::Header::new_ustar();
        header.set_size(3);
        builder.append_data(&mut header, "holes", &b"abc"[..]).expect("appended");
        let found = read(&builder.into_inner().expect("finished")).expect("read");
        assert_eq!((found[0].0.kind, found[0].0.size, found[0].0.real_size), (Kind::Sparse, 3, 1 << 40));
    }

    #[test]
    fn numbers_come_in_every_form() {
        for (field, wanted) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"00x", None),
            (b"-1", None),
            (b"\x80\0\0\0\0\0\x01\x02", Some(258)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ] {
            assert_eq!(number(field), wanted, "{field:?}");
        }
    }

    #[test]
    fn times_out_of_range_become_1970() {
        assert_eq!(time(b"-3.25"), Some((-3, 250_000_000)));
        assert_eq!(time(b"1.x"), None);
        assert_eq!(time(b"7"), Some((7, 0)));
    }
}
