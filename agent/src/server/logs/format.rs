//! From CRI log lines to what the client gets. Pure.
//!
//! A line is `<RFC 3339 time> <stdout|stderr> <tags> <text>`; tag `P` means that the line goes on in the next entry.
//! Format: design proposal "CRI: Log management".

use jiff::Timestamp;

use super::options::LogOptions;

/// Turns entries into output, minding filters, time stamps and the byte limit.
#[derive(Debug)]
pub(super) struct Formatter {
    timestamps: bool,
    since: Option<Timestamp>,
    stream: Option<&'static str>,
    /// Bytes that may still be sent.
    left: Option<u64>,
    /// Whether the next entry begins a line.
    at_line_start: bool,
}

impl Formatter {
    /// A formatter for these options.
    pub(super) fn new(options: &LogOptions) -> Self {
        Self {
            timestamps: options.timestamps,
            since: options.since,
            stream: options.stream,
            left: options.limit,
            at_line_start: true,
        }
    }

    /// Appends one entry (without its newline) to `out`. An entry that is not in the format is left out.
    pub(super) fn push(&mut self, entry: &[u8], out: &mut Vec<u8>) {
        let Some((time, rest)) = split_once(entry) else { return };
        let Some((stream, rest)) = split_once(rest) else { return };
        // An empty text may come without the space before it.
        let (tags, text) = split_once(rest).unwrap_or((rest, &[]));
        if self.stream.is_some_and(|wanted| wanted.as_bytes() != stream) || self.is_too_old(time) {
            return;
        }
        let is_partial = tags.split(|byte| *byte == b':').next() == Some(b"P");
        if self.timestamps && self.at_line_start {
            self.emit(time, out);
            self.emit(b" ", out);
        }
        self.emit(text, out);
        if !is_partial {
            self.emit(b"\n", out);
        }
        self.at_line_start = !is_partial;
    }

    /// Whether the byte limit is reached.
    pub(super) fn is_done(&self) -> bool {
        self.left == Some(0)
    }

    fn is_too_old(&self, time: &[u8]) -> bool {
        let Some(since) = self.since else { return false };
        let time = std::str::from_utf8(time).ok().and_then(|text| text.parse::<Timestamp>().ok());
        time.is_none_or(|time| time < since)
    }

    fn emit(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let allowed = match &mut self.left {
            None => bytes.len(),
            Some(left) => {
                let allowed = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= allowed as u64;
                allowed
            }
        };
        out.extend_from_slice(&bytes[..allowed]);
    }
}

fn split_once(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    Some((&bytes[..space], &bytes[space + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRIES: [&str; 5] = [
        "2026-01-01T00:00:00.5Z stdout F one",
        "2026-01-01T00:00:01.5Z stderr P tw",
        "2026-01-01T00:00:02.5Z stderr F o",
        "nonsense",
        "2026-01-01T00:00:03.5Z stdout F",
    ];

    fn format(options: &LogOptions) -> String {
        let mut formatter = Formatter::new(options);
        let mut out = Vec::new();
        for entry in ENTRIES {
            formatter.push(entry.as_bytes(), &mut out);
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn prefixes_go_and_partial_lines_join() {
        assert_eq!(format(&LogOptions::default()), "one\ntwo\n\n");
        let stamped = LogOptions { timestamps: true, ..LogOptions::default() };
        assert_eq!(
            format(&stamped),
            "2026-01-01T00:00:00.5Z one\n2026-01-01T00:00:01.5Z two\n2026-01-01T00:00:03.5Z \n"
        );
    }

    #[test]
    fn filters_and_limit() {
        let stderr = LogOptions { stream: Some("stderr"), ..LogOptions::default() };
        assert_eq!(format(&stderr), "two\n");
        let since =
            LogOptions { since: Some("2026-01-01T00:00:02Z".parse().unwrap()), ..LogOptions::default() };
        assert_eq!(format(&since), "o\n\n");
        let limited = LogOptions { limit: Some(5), ..LogOptions::default() };
        assert_eq!(format(&limited), "one\nt");
    }
}
