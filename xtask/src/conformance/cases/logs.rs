//! Container logs: the CRI's format, splits, reopening.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cri_shim_api::v1;

use super::super::case::{Case, case, refused, same};
use super::super::context::{Pod, T};

/// Longest piece of a line.
const PIECE: usize = 16 * 1024;
/// A log of an ended container that has not grown for so long is whole, or has lost something.
const STANDSTILL: Duration = Duration::from_secs(10);

pub(crate) fn cases() -> Vec<Case> {
    let group = "logs";
    vec![
        case(group, "every line has an RFC 3339 time with nanoseconds, a stream, a tag and the text", format),
        case(group, "stdout and stderr are told apart", streams),
        case(group, "a line of exactly 16 KiB, one below and one above", splits),
        case(group, "a line of 100 KiB is pieces of 16 KiB tagged P and a last one tagged F", long_line),
        case(group, "text without a newline at the end is tagged P", no_newline),
        case(group, "empty lines and bytes that are no UTF-8 are kept", odd_bytes),
        case(group, "lines of a terminal end without a carriage return", carriage_return),
        case(group, "times never go backwards", monotonic),
        case(group, "100,000 lines arrive complete and in order", many_lines),
        case(group, "no log path: the output is thrown away and nothing blocks", no_path),
        case(group, "ReopenContainerLog after a rename writes to a new file and loses no line", reopen),
        case(group, "ReopenContainerLog of an ended container is refused", reopen_ended),
        case(group, "ReopenContainerLog of an unknown container is refused", reopen_unknown),
        case(group, "the file is not readable for others", mode),
        case(group, "is complete when the container is told EXITED", complete_at_exit),
        case(group, "an attempt to start that failed leaves the earlier attempt's file alone", attempts),
    ]
}

/// One line of a log.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line<'a> {
    /// As written.
    pub(crate) time: &'a str,
    /// `stdout` or `stderr`.
    pub(crate) stream: &'a str,
    /// `P` or `F`.
    pub(crate) tag: &'a str,
    /// The rest.
    pub(crate) text: &'a [u8],
}

/// Parses a log; an error names the line that is not in the format.
pub(crate) fn parse(log: &[u8]) -> Result<Vec<Line<'_>>> {
    let mut lines: Vec<&[u8]> = log.split(|byte| *byte == b'\n').collect();
    if lines.pop().is_some_and(|rest| !rest.is_empty()) {
        bail!("the log does not end with a newline");
    }
    lines
        .into_iter()
        .enumerate()
        .map(|(number, line)| {
            line_of(line).with_context(|| format!("line {}: {:?}", number + 1, String::from_utf8_lossy(line)))
        })
        .collect()
}

fn line_of(line: &[u8]) -> Result<Line<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let mut word = || std::str::from_utf8(parts.next().unwrap_or_default()).context("not UTF-8");
    let (time, stream, tag) = (word()?, word()?, word()?);
    let text = parts.next().context("fewer than four fields")?;
    check_time(time)?;
    anyhow::ensure!(matches!(stream, "stdout" | "stderr"), "the stream is {stream:?}");
    anyhow::ensure!(matches!(tag, "P" | "F"), "the tag is {tag:?}");
    Ok(Line { time, stream, tag, text })
}

/// `2026-01-02T03:04:05.123456789+01:00` or with `Z`.
fn check_time(time: &str) -> Result<()> {
    let shape: String =
        time.chars().map(|character| if character.is_ascii_digit() { '0' } else { character }).collect();
    let rest = shape.strip_prefix("0000-00-00T00:00:00.").with_context(|| format!("the time is {time:?}"))?;
    let zone = rest.trim_start_matches('0');
    anyhow::ensure!(matches!(zone, "Z" | "+00:00" | "-00:00"), "the time is {time:?}");
    anyhow::ensure!(rest.len() - zone.len() <= 9, "the time is {time:?}");
    Ok(())
}

/// The text of a log without the prefixes; pieces tagged P are joined.
pub(crate) fn text_of(log: &str) -> Result<String> {
    let mut text = Vec::new();
    for line in parse(log.as_bytes())? {
        text.extend_from_slice(line.text);
        if line.tag == "F" {
            text.push(b'\n');
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Runs a script to its end and gives its raw log.
async fn raw(t: &T, script: &str, change: impl FnOnce(&mut v1::ContainerConfig)) -> Result<Vec<u8>> {
    let pod = t.sandbox().await?;
    let mut config = t.shell(script);
    change(&mut config);
    let id = t.launch(&pod, &config).await?;
    t.exited(&id).await?;
    settled(&T::log_file(&pod, &config)).await
}

/// The file once it has stopped growing.
async fn settled(file: &std::path::Path) -> Result<Vec<u8>> {
    let mut last = Vec::new();
    for round in 0.. {
        let now = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
        if now == last && (round > 20 || !now.is_empty() && round > 5) {
            break;
        }
        last = now;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(last)
}

async fn format(t: T) -> Result<()> {
    let log = raw(&t, "echo hello world; echo 'two  blanks '", |_| ()).await?;
    let lines = parse(&log)?;
    let found: Vec<_> = lines.iter().map(|line| (line.stream, line.tag, line.text)).collect();
    same("the log", found, vec![("stdout", "F", &b"hello world"[..]), ("stdout", "F", b"two  blanks ")])
}

async fn streams(t: T) -> Result<()> {
    let log = raw(&t, "echo out; echo err >&2; echo out again", |_| ()).await?;
    let lines = parse(&log)?;
    let of = |stream: &str| {
        lines.iter().filter(|line| line.stream == stream).map(|line| line.text).collect::<Vec<_>>()
    };
    same("stdout", of("stdout"), vec![&b"out"[..], b"out again"])?;
    same("stderr", of("stderr"), vec![&b"err"[..]])
}

/// A script that prints a line of so many `x`.
fn xs(count: usize) -> String {
    format!("dd if=/dev/zero bs={count} count=1 2>/dev/null | tr '\\000' x; echo")
}

async fn splits(t: T) -> Result<()> {
    for (count, wanted) in [
        (PIECE - 1, vec![("F", PIECE - 1)]),
        (PIECE, vec![("F", PIECE)]),
        (PIECE + 1, vec![("P", PIECE), ("F", 1)]),
    ] {
        let log = raw(&t, &xs(count), |_| ()).await?;
        let found: Vec<_> = parse(&log)?.iter().map(|line| (line.tag, line.text.len())).collect();
        // A runtime that sees the newline only later may close the full piece first.
        let spread: Vec<_> = if count == PIECE { vec![("P", PIECE), ("F", 0)] } else { wanted.clone() };
        anyhow::ensure!(found == wanted || found == spread, "{count} bytes: {found:?}, expected {wanted:?}");
    }
    Ok(())
}

async fn long_line(t: T) -> Result<()> {
    let log = raw(&t, &xs(100 * 1024), |_| ()).await?;
    let lines = parse(&log)?;
    same("bytes", lines.iter().map(|line| line.text.len()).sum::<usize>(), 100 * 1024)?;
    let (last, pieces) = lines.split_last().context("no line")?;
    same("the last tag", last.tag, "F")?;
    anyhow::ensure!(pieces.len() >= 6, "only {} pieces", pieces.len());
    for piece in pieces {
        same("a piece", (piece.tag, piece.text.len()), ("P", PIECE))?;
    }
    Ok(())
}

async fn no_newline(t: T) -> Result<()> {
    let log = raw(&t, "echo whole; printf part", |_| ()).await?;
    let found: Vec<_> = parse(&log)?.iter().map(|line| (line.tag, line.text.to_vec())).collect();
    same("the log", found, vec![("F", b"whole".to_vec()), ("P", b"part".to_vec())])
}

async fn odd_bytes(t: T) -> Result<()> {
    let log = raw(&t, r"echo; printf '\377\376 \t\n'; echo; echo end", |_| ()).await?;
    let found: Vec<_> = parse(&log)?.iter().map(|line| line.text.to_vec()).collect();
    same("the log", found, vec![b"".to_vec(), b"\xff\xfe \t".to_vec(), b"".to_vec(), b"end".to_vec()])
}

async fn carriage_return(t: T) -> Result<()> {
    let log = raw(&t, "echo one; echo two", |config| config.tty = true).await?;
    let found: Vec<_> = parse(&log)?.iter().map(|line| line.text.to_vec()).collect();
    same("the log", found, vec![b"one".to_vec(), b"two".to_vec()])
}

async fn monotonic(t: T) -> Result<()> {
    let log = raw(&t, "for i in 1 2 3 4 5 6 7 8 9; do echo $i; usleep 1000; done", |_| ()).await?;
    let lines = parse(&log)?;
    same("lines", lines.len(), 9)?;
    // One zone and up to nine digits: compared with the digits filled up.
    let key = |time: &str| {
        let (head, rest) = time.split_once('.').unwrap_or((time, ""));
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        format!("{head}.{digits:0<9}")
    };
    for pair in lines.windows(2) {
        anyhow::ensure!(key(pair[0].time) <= key(pair[1].time), "{} then {}", pair[0].time, pair[1].time);
    }
    Ok(())
}

async fn many_lines(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let config = t.shell("seq 1 100000");
    let id = t.launch(&pod, &config).await?;
    t.exited(&id).await?;
    let file = T::log_file(&pod, &config);
    let (mut length, mut since) = (0, Instant::now());
    let mut whole = || {
        let log = std::fs::read(&file).unwrap_or_default();
        if log.len() > length {
            (length, since) = (log.len(), Instant::now());
        }
        (log.ends_with(b" 100000\n") || since.elapsed() > STANDSTILL).then_some(log)
    };
    let log = t
        .until("100,000 lines are there", || {
            let log = whole();
            async move { Ok(log) }
        })
        .await?;
    let lines = parse(&log)?;
    same("lines", lines.len(), 100_000)?;
    for (number, line) in lines.iter().enumerate() {
        let wanted = (number + 1).to_string();
        anyhow::ensure!(line.text == wanted.as_bytes(), "line {wanted} is {line:?}");
    }
    Ok(())
}

async fn no_path(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let mut config = t.shell("seq 1 200000");
    config.log_path = String::new();
    let id = t.launch(&pod, &config).await?;
    same("exit_code", t.exited(&id).await?.exit_code, 0)
}

async fn reopen_log(t: &T, id: &str) -> Result<(), tonic::Status> {
    t.rt().reopen_container_log(v1::ReopenContainerLogRequest { container_id: id.to_owned() }).await.map(drop)
}

async fn reopen(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let config = t.shell("i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo $i; done; sleep 3600");
    let id = t.launch(&pod, &config).await?;
    let file = T::log_file(&pod, &config);
    let mut rotated = Vec::new();
    for round in 0..5 {
        t.until("the log has text", || async {
            Ok(std::fs::metadata(&file).is_ok_and(|meta| meta.len() > 0).then_some(()))
        })
        .await?;
        let old = file.with_extension(format!("log.{round}"));
        std::fs::rename(&file, &old)?;
        reopen_log(&t, &id).await.context("ReopenContainerLog")?;
        anyhow::ensure!(file.exists(), "there is no new file after ReopenContainerLog");
        rotated.push(old);
        if std::fs::read(&rotated[round])?.windows(6).any(|window| window == b" 3000\n") {
            break;
        }
        if round >= 1 && all_lines(&rotated, &file)?.len() >= 3000 {
            break;
        }
    }
    let lines = t
        .until("all lines are there", || async {
            let lines = all_lines(&rotated, &file)?;
            Ok((lines.len() >= 3000).then_some(lines))
        })
        .await?;
    let wanted: Vec<String> = (1..=3000).map(|number: u32| number.to_string()).collect();
    anyhow::ensure!(lines == wanted, "lines are lost, doubled or out of order: {} lines", lines.len());
    Ok(())
}

fn all_lines(rotated: &[std::path::PathBuf], file: &std::path::Path) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for path in rotated.iter().map(std::path::PathBuf::as_path).chain([file]) {
        let log = std::fs::read(path).unwrap_or_default();
        // The last line may be half written now.
        let end = log.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        lines.extend(parse(&log[..end])?.iter().map(|line| String::from_utf8_lossy(line.text).into_owned()));
    }
    Ok(lines)
}

async fn reopen_ended(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    let id = t.launch(&pod, &t.shell("true")).await?;
    t.exited(&id).await?;
    refused("ReopenContainerLog of an ended container", reopen_log(&t, &id).await).map(drop)
}

async fn reopen_unknown(t: T) -> Result<()> {
    refused("ReopenContainerLog of an unknown container", reopen_log(&t, "nothing").await).map(drop)
}

async fn mode(t: T) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let pod = t.sandbox().await?;
    let config = t.shell("echo");
    let id = t.launch(&pod, &config).await?;
    t.exited(&id).await?;
    let mode = std::fs::metadata(T::log_file(&pod, &config))?.permissions().mode() & 0o777;
    same("the file's mode", format!("{mode:o}").as_str(), "640")
}

async fn complete_at_exit(t: T) -> Result<()> {
    let pod = t.sandbox().await?;
    for _ in 0..5 {
        let config = t.shell("seq 1 2000; echo last");
        let id = t.launch(&pod, &config).await?;
        t.exited(&id).await?;
        let log = std::fs::read(T::log_file(&pod, &config))?;
        anyhow::ensure!(log.ends_with(b" last\n"), "the last line is missing {} bytes in", log.len());
    }
    Ok(())
}

async fn attempts(t: T) -> Result<()> {
    let pod: Pod = t.sandbox().await?;
    let mut config = t.shell("echo first");
    let id = t.launch(&pod, &config).await?;
    t.exited(&id).await?;
    let file = T::log_file(&pod, &config);
    let before = settled(&file).await?;
    config.metadata.get_or_insert_default().attempt = 1;
    config.log_path = format!("again-{}", config.log_path);
    let id = t.launch(&pod, &config).await?;
    t.exited(&id).await?;
    same("the first attempt's log", std::fs::read(&file)?, before)?;
    same("lines of the second", parse(&settled(&T::log_file(&pod, &config)).await?)?.len(), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_checked() {
        let good = b"2026-01-02T03:04:05.123456789Z stdout F a b\n2026-01-02T03:04:05.1+00:00 stderr P \n";
        let lines = parse(good).unwrap();
        assert_eq!((lines[0].text, lines[1].tag, lines[1].text), (&b"a b"[..], "P", &b""[..]));
        for bad in [
            "2026-01-02T03:04:05Z stdout F a\n",
            "2026-01-02T03:04:05.1Z stdin F a\n",
            "2026-01-02T03:04:05.1Z stdout X a\n",
            "2026-01-02T03:04:05.1Z stdout F\n",
            "2026-01-02T03:04:05.1Z stdout F a",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pieces_are_joined() {
        let log = "2026-01-02T03:04:05.1Z stdout P ab\n2026-01-02T03:04:05.1Z stdout F c\n";
        assert_eq!(text_of(log).unwrap(), "abc\n");
    }
}
