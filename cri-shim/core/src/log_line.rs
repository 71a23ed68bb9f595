//! The CRI log format: `<time> <stream> <P|F> <content>`, one line each, long lines in pieces.
//!
//! See "CRI logging" in the kubelet's design: `F` ends a line, `P` is a piece of one that goes on.

use jiff::Timestamp;

/// Largest content of one log line; more is split.
pub const MAX_CONTENT: usize = 16 * 1024;

/// The stream a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output (and a terminal's only stream).
    Stdout,
    /// Standard error.
    Stderr,
}

impl LogStream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Turns the bytes of one stream into log lines, keeping the unfinished end (at most [`MAX_CONTENT`] bytes).
#[derive(Debug)]
pub struct LineSplitter {
    stream: LogStream,
    pending: Vec<u8>,
}

impl LineSplitter {
    /// A splitter at the start of a line.
    pub fn new(stream: LogStream) -> Self {
        Self { stream, pending: Vec::new() }
    }

    /// Appends to `out` every line that `bytes`, read at `now`, completes.
    pub fn feed(&mut self, mut bytes: &[u8], now: Timestamp, out: &mut Vec<u8>) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.append(&bytes[..end], now, out);
            bytes = &bytes[end + 1..];
            if self.pending.last() == Some(&b'\r') {
                self.pending.pop();
            }
            write_line(out, now, self.stream, true, &self.pending);
            self.pending.clear();
        }
        self.append(bytes, now, out);
    }

    /// Appends what is left when the stream has ended, as an unfinished line.
    pub fn finish(&mut self, now: Timestamp, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            write_line(out, now, self.stream, false, &self.pending);
            self.pending.clear();
        }
    }

    /// Adds content of the current line, writing pieces once it is known to be longer than one piece.
    fn append(&mut self, mut content: &[u8], now: Timestamp, out: &mut Vec<u8>) {
        while self.pending.len() + content.len() > MAX_CONTENT {
            let (head, tail) = content.split_at(MAX_CONTENT - self.pending.len());
            self.pending.extend_from_slice(head);
            write_line(out, now, self.stream, false, &self.pending);
            self.pending.clear();
            content = tail;
        }
        self.pending.extend_from_slice(content);
    }
}

fn write_line(out: &mut Vec<u8>, now: Timestamp, stream: LogStream, full: bool, content: &[u8]) {
    let tag = if full { 'F' } else { 'P' };
    out.extend_from_slice(format!("{now:.9} {} {tag} ", stream.name()).as_bytes());
    out.extend_from_slice(content);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lines(chunks: &[&[u8]]) -> Vec<(String, Vec<u8>)> {
        let mut splitter = LineSplitter::new(LogStream::Stdout);
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.feed(chunk, Timestamp::UNIX_EPOCH, &mut out);
        }
        splitter.finish(Timestamp::UNIX_EPOCH, &mut out);
        out.split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| {
                let mut parts = line.splitn(4, |byte| *byte == b' ');
                let head: Vec<&[u8]> = parts.by_ref().take(3).collect();
                (String::from_utf8(head[2].to_vec()).unwrap(), parts.next().unwrap_or_default().to_vec())
            })
            .collect()
    }

    #[test]
    fn a_line_looks_as_the_kubelet_parses_it() {
        let mut out = Vec::new();
        let now = Timestamp::new(1_700_000_000, 123_000_000).unwrap();
        LineSplitter::new(LogStream::Stderr).feed(b"hello\r\n", now, &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), "2023-11-14T22:13:20.123000000Z stderr F hello\n");
    }

    #[test]
    fn long_lines_are_split_and_an_unfinished_one_is_partial() {
        let long = vec![b'x'; MAX_CONTENT + 5];
        let split = lines(&[&long, b"\nend"]);
        let tags: Vec<_> = split.iter().map(|(tag, content)| (tag.as_str(), content.len())).collect();
        assert_eq!(tags, [("P", MAX_CONTENT), ("F", 5), ("P", 3)]);
        let exact = vec![b'x'; MAX_CONTENT];
        assert_eq!(lines(&[&exact, b"\n"]).len(), 1, "a line of exactly one piece is not split");
    }

    /// The whole output for a stream that arrives in these pieces.
    fn output<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
        let mut splitter = LineSplitter::new(LogStream::Stdout);
        let mut out = Vec::new();
        for piece in pieces {
            splitter.feed(piece, Timestamp::UNIX_EPOCH, &mut out);
        }
        splitter.finish(Timestamp::UNIX_EPOCH, &mut out);
        out
    }

    proptest! {
        #[test]
        fn long_lines_come_out_the_same_however_the_stream_is_cut(
            runs in proptest::collection::vec((prop_oneof![Just(b'\n'), Just(b'\r'), Just(b'x')], 1_usize..40_000), 0..6),
            cut in 1_usize..20_000,
        ) {
            let times = |(byte, times): (u8, usize)| if byte == b'x' { times } else { 1 + times % 3 };
            let text: Vec<u8> =
                runs.into_iter().flat_map(|run| std::iter::repeat_n(run.0, times(run))).collect();
            let whole = output(std::iter::once(text.as_slice()));
            prop_assert_eq!(&whole, &output(text.chunks(cut)));
            let mut rebuilt = Vec::new();
            for line in whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
                let parts: Vec<&[u8]> = line.splitn(4, |byte| *byte == b' ').collect();
                prop_assert!(parts[3].len() <= MAX_CONTENT);
                rebuilt.extend_from_slice(parts[3]);
                if parts[2] == b"F" {
                    rebuilt.push(b'\n');
                }
            }
            let mut expected = Vec::new();
            for line in text.split_inclusive(|byte| *byte == b'\n') {
                let without = line.strip_suffix(b"\r\n").map(|line| [line, b"\n"].concat());
                expected.extend_from_slice(without.as_deref().unwrap_or(line));
            }
            prop_assert!(rebuilt == expected, "{} bytes of {}", rebuilt.len(), expected.len());
        }

        #[test]
        fn no_byte_is_lost_however_the_stream_is_cut(
            text in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'a'), Just(b' ')], 0..400),
            cuts in proptest::collection::vec(0_usize..400, 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.sort_unstable();
            cuts.push(text.len());
            let mut start = 0;
            let mut chunks = Vec::new();
            for cut in cuts {
                chunks.push(&text[start..cut]);
                start = cut;
            }
            let mut rebuilt = Vec::new();
            for (tag, content) in lines(&chunks) {
                rebuilt.extend_from_slice(&content);
                if tag == "F" {
                    rebuilt.push(b'\n');
                }
            }
            prop_assert_eq!(rebuilt, text);
        }
    }
}
