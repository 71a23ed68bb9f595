//! Log lines: any bytes in any pieces give the same lines, none longer than allowed, and nothing is lost.
#![no_main]

use cri_shim_core::log_line::{LineSplitter, LogStream, MAX_CONTENT};
use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;

fn lines<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut splitter = LineSplitter::new(LogStream::Stdout);
    let mut out = Vec::new();
    for piece in pieces {
        splitter.feed(piece, Timestamp::UNIX_EPOCH, &mut out);
    }
    splitter.finish(Timestamp::UNIX_EPOCH, &mut out);
    out
}

fuzz_target!(|input: (&[u8], u16, u8)| {
    // Long lines are what is interesting, and the fuzzer makes short inputs.
    let (bytes, cut, times) = input;
    let bytes = bytes.repeat(usize::from(times) + 1);
    let whole = lines(std::iter::once(bytes.as_slice()));
    assert_eq!(whole, lines(bytes.chunks(usize::from(cut).max(1))));
    let mut rebuilt = Vec::new();
    for line in whole.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let parts: Vec<&[u8]> = line.splitn(4, |byte| *byte == b' ').collect();
        let [_, b"stdout", tag, content] = parts[..] else { panic!("no log line: {line:?}") };
        assert!(content.len() <= MAX_CONTENT);
        rebuilt.extend_from_slice(content);
        if tag == b"F" {
            rebuilt.push(b'\n');
        }
    }
    // Only the carriage return before the end of a line is taken.
    let mut expected = Vec::new();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let kept = line.strip_suffix(b"\r\n").map(|line| [line, b"\n"].concat());
        expected.extend_from_slice(kept.as_deref().unwrap_or(line));
    }
    // One that fell on the edge between two pieces of a long line is written before its fate is known.
    let without = |bytes: &[u8]| bytes.iter().copied().filter(|byte| *byte != b'\r').collect::<Vec<_>>();
    assert_eq!(without(&rebuilt), without(&expected));
    assert!(rebuilt.len() >= expected.len());
});
