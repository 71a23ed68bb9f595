//! What came out: lines while it runs, a table at the end, JUnit XML, and the comparison of several runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::write_atomic;

/// How one case ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The promise is kept.
    Passed,
    /// It is not, or cleaning up failed.
    Failed(String),
    /// It is not, and the list of known failures says why.
    Known(String),
    /// The list of known failures is wrong about it.
    KnownButPassed(String),
    /// It could not be asked here.
    Skipped(String),
}

impl Outcome {
    /// One word for tables.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::Passed | Self::KnownButPassed(_) => "ok",
            Self::Failed(_) => "FAILED",
            Self::Known(_) => "known",
            Self::Skipped(_) => "skipped",
        }
    }
}

/// One finished case.
#[derive(Debug, Clone)]
pub(crate) struct Done {
    /// Group.
    pub(crate) group: String,
    /// Name.
    pub(crate) name: String,
    /// How long it took.
    pub(crate) time: Duration,
    /// How it ended.
    pub(crate) outcome: Outcome,
}

/// Takes skips of cases that must run here for what they are: failures.
pub(crate) fn without_skips(mut all: Vec<Done>, filter: &str) -> Vec<Done> {
    for done in &mut all {
        if let Outcome::Skipped(reason) = &done.outcome
            && super::list::matches(&format!("{}: {}", done.group, done.name), filter)
        {
            done.outcome =
                Outcome::Failed(format!("skipped, and this machine must have what it needs: {reason}"));
        }
    }
    all
}

/// Prints the line of one case.
pub(crate) fn line(done: &Done) {
    let (word, seconds) = (done.outcome.word(), done.time.as_secs_f32());
    println!("{word:>8} {seconds:6.2} s  {}: {}", done.group, done.name);
    match &done.outcome {
        Outcome::Failed(why) | Outcome::Skipped(why) | Outcome::Known(why) => {
            println!("                   {why}");
        }
        Outcome::KnownButPassed(why) => {
            println!("                   listed as a known failure ({why}), but it passes");
        }
        Outcome::Passed => {}
    }
}

/// Prints the table by group; tells whether nothing failed.
pub(crate) fn table(runtime: &str, all: &[Done], took: Duration) -> bool {
    let mut groups: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
    for done in all {
        let counts = groups.entry(&done.group).or_default();
        counts[column(&done.outcome)] += 1;
    }
    println!("\n{:<34}{:>7}{:>8}{:>8}{:>9}", "group", "passed", "failed", "known", "skipped");
    let mut sum = [0; 4];
    for (group, counts) in &groups {
        println!("{group:<34}{:>7}{:>8}{:>8}{:>9}", counts[0], counts[1], counts[2], counts[3]);
        for (total, count) in sum.iter_mut().zip(counts) {
            *total += count;
        }
    }
    println!("{:<34}{:>7}{:>8}{:>8}{:>9}", "all", sum[0], sum[1], sum[2], sum[3]);
    for done in all {
        match &done.outcome {
            Outcome::Failed(why) => println!("\nFAILED  {}: {}\n        {why}", done.group, done.name),
            Outcome::KnownButPassed(_) => {
                println!("\nlisted as a known failure, but it passes: {}: {}", done.group, done.name);
            }
            _ => {}
        }
    }
    println!("\n{} cases on {runtime} in {:.1} s", all.len(), took.as_secs_f32());
    sum[1] == 0
}

fn column(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Passed | Outcome::KnownButPassed(_) => 0,
        Outcome::Failed(_) => 1,
        Outcome::Known(_) => 2,
        Outcome::Skipped(_) => 3,
    }
}

/// Writes JUnit XML: a suite per group.
pub(crate) fn junit(file: &Path, runtime: &str, all: &[Done]) -> Result<()> {
    write_atomic(file, junit_text(runtime, all).as_bytes()).context("writing the JUnit file")
}

fn junit_text(runtime: &str, all: &[Done]) -> String {
    let mut groups: BTreeMap<&str, Vec<&Done>> = BTreeMap::new();
    for done in all {
        groups.entry(&done.group).or_default().push(done);
    }
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"{}\" {}>\n",
        escape(runtime),
        counts(&all.iter().collect::<Vec<_>>())
    );
    for (group, cases) in groups {
        // Writing to a String cannot fail.
        writeln!(text, "  <testsuite name=\"{}\" {}>", escape(group), counts(&cases)).ok();
        for done in cases {
            text.push_str(&testcase(done));
        }
        text.push_str("  </testsuite>\n");
    }
    text.push_str("</testsuites>\n");
    text
}

fn counts(cases: &[&Done]) -> String {
    let count =
        |column_wanted: usize| cases.iter().filter(|done| column(&done.outcome) == column_wanted).count();
    let time: f32 = cases.iter().map(|done| done.time.as_secs_f32()).sum();
    format!(
        "tests=\"{}\" failures=\"{}\" skipped=\"{}\" time=\"{time:.3}\"",
        cases.len(),
        count(1),
        count(2) + count(3)
    )
}

fn testcase(done: &Done) -> String {
    let head = format!(
        "    <testcase classname=\"{}\" name=\"{}\" time=\"{:.3}\"",
        escape(&done.group),
        escape(&done.name),
        done.time.as_secs_f32()
    );
    match &done.outcome {
        Outcome::Passed | Outcome::KnownButPassed(_) => format!("{head}/>\n"),
        Outcome::Failed(why) => format!("{head}><failure message=\"{}\"/></testcase>\n", escape(why)),
        Outcome::Known(why) => {
            format!("{head}><skipped message=\"known failure: {}\"/></testcase>\n", escape(why))
        }
        Outcome::Skipped(why) => format!("{head}><skipped message=\"{}\"/></testcase>\n", escape(why)),
    }
}

/// XML text; characters that XML 1.0 cannot hold become the replacement character.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\r' | '\t' => write!(out, "&#{};", u32::from(character)).unwrap_or_default(),
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}

fn unescape(text: &str) -> String {
    [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#10;", "\n"),
        ("&#13;", "\r"),
        ("&#9;", "\t"),
        ("&amp;", "&"),
    ]
    .iter()
    .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Prints the cases in which several runs' JUnit files differ, and each run's sums.
pub(crate) fn compare(files: &[std::path::PathBuf]) -> Result<()> {
    let mut runs = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        runs.push((name, read_back(&text)));
    }
    let mut ids: Vec<&String> = runs.iter().flat_map(|(_, cases)| cases.keys()).collect();
    ids.sort();
    ids.dedup();
    let word =
        |cases: &BTreeMap<String, String>, id: &String| cases.get(id).cloned().unwrap_or("-".to_owned());
    for (name, _) in &runs {
        print!("{name:>16}");
    }
    println!("   case (only those that differ)");
    for id in &ids {
        let words: Vec<String> = runs.iter().map(|(_, cases)| word(cases, id)).collect();
        if words.iter().any(|other| *other != words[0]) {
            for word in &words {
                print!("{word:>16}");
            }
            println!("   {id}");
        }
    }
    for outcome in ["ok", "FAILED", "skipped"] {
        for (_, cases) in &runs {
            print!("{:>16}", cases.values().filter(|word| *word == outcome).count());
        }
        println!("   {outcome}");
    }
    Ok(())
}

/// Case ids and outcomes of a file that [`junit`] wrote.
fn read_back(text: &str) -> BTreeMap<String, String> {
    let attribute = |tag: &str, name: &str| {
        let start = tag.find(&format!(" {name}=\""))? + name.len() + 3;
        let rest = &tag[start..];
        Some(unescape(&rest[..rest.find('"')?]))
    };
    text.split("<testcase")
        .skip(1)
        .filter_map(|tag| {
            let id = format!("{}: {}", attribute(tag, "classname")?, attribute(tag, "name")?);
            let outcome = if tag.contains("<failure") || tag.contains("message=\"known failure") {
                "FAILED"
            } else if tag.contains("<skipped") {
                "skipped"
            } else {
                "ok"
            };
            Some((id, outcome.to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(name: &str, outcome: Outcome) -> Done {
        Done {
            group: "logs & <io>".to_owned(),
            name: name.to_owned(),
            time: Duration::from_millis(1500),
            outcome,
        }
    }

    #[test]
    fn a_skip_that_must_not_be_is_a_failure() {
        let all = vec![
            done("AppArmor confines", Outcome::Skipped("none here".to_owned())),
            done("SELinux labels", Outcome::Skipped("none here".to_owned())),
            done("AppArmor of exec", Outcome::Passed),
        ];
        let words: Vec<_> =
            without_skips(all, "apparmor|criu").iter().map(|done| done.outcome.word()).collect();
        assert_eq!(words, ["FAILED", "skipped", "ok"]);
    }

    #[test]
    fn junit_escapes_and_counts() {
        let all = [
            done("a \"quoted\" name", Outcome::Passed),
            done("b", Outcome::Failed("line 1\nline 2 \u{1b}[0m <x>".to_owned())),
            done("c", Outcome::Skipped("no AppArmor".to_owned())),
            done("d", Outcome::Known("not in 1.6".to_owned())),
        ];
        let text = junit_text("containerd 1.6", &all);
        assert!(text.contains(
            "classname=\"logs &amp; &lt;io&gt;\" name=\"a &quot;quoted&quot; name\" time=\"1.500\"/>"
        ));
        assert!(text.contains("<failure message=\"line 1&#10;line 2 \u{fffd}[0m &lt;x&gt;\"/>"), "{text}");
        assert!(text.contains("tests=\"4\" failures=\"1\" skipped=\"2\" time=\"6.000\""), "{text}");
        let back = read_back(&text);
        assert_eq!(back["logs & <io>: a \"quoted\" name"], "ok");
        assert_eq!(back["logs & <io>: b"], "FAILED");
        assert_eq!(back["logs & <io>: c"], "skipped");
        assert_eq!(back["logs & <io>: d"], "FAILED", "a comparison tells what a list excuses");
    }
}
