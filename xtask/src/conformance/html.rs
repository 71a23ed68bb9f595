//! The report of a run as one page: sums, groups and every case, with the reasons of what did not pass. It needs nothing
//! but itself, so that it can be sent around.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::report::{Done, Outcome, escape};
use crate::process::write_atomic;

const STYLE: &str = "\
:root{color-scheme:light dark;--ok:#2e7d32;--bad:#c62828;--known:#b26a00;--dim:#777}\
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.4rem;margin-bottom:.2rem}p.facts{color:var(--dim);margin-top:0}\
.bar{display:flex;height:.8rem;border-radius:.4rem;overflow:hidden;margin:1rem 0;background:#8883}\
.bar span{display:block}.passed{background:var(--ok)}.failed{background:var(--bad)}.known{background:var(--known)}\
details{border-bottom:1px solid #8883;padding:.3rem 0}summary{cursor:pointer}summary b{font-weight:600}\
summary small{color:var(--dim);margin-left:.6rem}table{border-collapse:collapse;width:100%;margin:.3rem 0 .6rem}\
td{padding:.15rem .6rem .15rem 0;vertical-align:top;border-top:1px solid #8882}td.time{text-align:right;color:var(--dim);white-space:nowrap}\
td.word{white-space:nowrap;font-weight:600}.w-ok{color:var(--ok)}.w-FAILED{color:var(--bad)}.w-known{color:var(--known)}\
.w-skipped{color:var(--dim)}pre{white-space:pre-wrap;margin:.1rem 0;font-size:.85em;color:var(--dim)}";

/// Writes the page; `facts` are told below the title.
pub(super) fn write(file: &Path, title: &str, facts: &[String], all: &[Done], took: Duration) -> Result<()> {
    write_atomic(file, page(title, facts, all, took).as_bytes()).context("writing the HTML report")
}

/// Counts of passed, failed, known and skipped cases.
fn sums<'a>(all: impl IntoIterator<Item = &'a Done>) -> [usize; 4] {
    let mut sums = [0; 4];
    for done in all {
        let index = match &done.outcome {
            Outcome::Passed | Outcome::KnownButPassed(_) => 0,
            Outcome::Failed(_) => 1,
            Outcome::Known(_) => 2,
            Outcome::Skipped(_) => 3,
        };
        sums[index] += 1;
    }
    sums
}

fn words([passed, failed, known, skipped]: [usize; 4]) -> String {
    let named = [(passed, "passed"), (failed, "failed"), (known, "known to fail"), (skipped, "skipped")];
    let parts = named.iter().filter(|(count, _)| *count > 0).map(|(count, word)| format!("{count} {word}"));
    parts.collect::<Vec<_>>().join(", ")
}

fn page(title: &str, facts: &[String], all: &[Done], took: Duration) -> String {
    let total = sums(all);
    let title = escape(title);
    let mut text = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n\
         <p class=\"facts\">{}</p>\n<p><b>{} cases</b> in {:.0} s: {}</p>\n<div class=\"bar\">",
        facts.iter().map(|fact| escape(fact)).collect::<Vec<_>>().join(" · "),
        all.len(),
        took.as_secs_f32(),
        words(total)
    );
    for (class, count) in ["passed", "failed", "known", "skipped"].iter().zip(total) {
        // Writing to a String cannot fail.
        write!(text, "<span class=\"{class}\" style=\"flex:{count}\"></span>").ok();
    }
    text.push_str("</div>\n");
    let mut groups: BTreeMap<&str, Vec<&Done>> = BTreeMap::new();
    for done in all {
        groups.entry(&done.group).or_default().push(done);
    }
    for (group, cases) in groups {
        let counts = sums(cases.iter().copied());
        let open = if counts[1] > 0 { " open" } else { "" };
        writeln!(
            text,
            "<details{open}><summary><b>{}</b><small>{}</small></summary><table>",
            escape(group),
            words(counts)
        )
        .ok();
        for done in cases {
            text.push_str(&row(done));
        }
        text.push_str("</table></details>\n");
    }
    text.push_str("</body></html>\n");
    text
}

fn row(done: &Done) -> String {
    let why = match &done.outcome {
        Outcome::Passed => String::new(),
        Outcome::Failed(why) | Outcome::Known(why) | Outcome::Skipped(why) => {
            format!("<pre>{}</pre>", escape(why))
        }
        Outcome::KnownButPassed(why) => {
            format!("<pre>listed as a known failure, but it passes: {}</pre>", escape(why))
        }
    };
    let word = done.outcome.word();
    format!(
        "<tr><td class=\"word w-{word}\">{word}</td><td>{}{why}</td><td class=\"time\">{:.1} s</td></tr>\n",
        escape(&done.name),
        done.time.as_secs_f32()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_holds_every_case_and_escapes() {
        let done = |group: &str, outcome| Done {
            group: group.to_owned(),
            name: "a <b> & c".to_owned(),
            time: Duration::from_millis(1500),
            outcome,
        };
        let all = [
            done("Pods", Outcome::Passed),
            done("Pods", Outcome::Failed("<script>".to_owned())),
            done("Probes", Outcome::Known("later".to_owned())),
        ];
        let text = page("node <x>", &["v1.36".to_owned()], &all, Duration::from_secs(9));
        assert!(text.contains("<title>node &lt;x&gt;</title>") && !text.contains("<script>"), "{text}");
        assert!(text.contains("<b>3 cases</b> in 9 s: 1 passed, 1 failed, 1 known to fail"), "{text}");
        assert!(
            text.contains("<details open><summary><b>Pods</b><small>1 passed, 1 failed</small>"),
            "{text}"
        );
        assert!(text.contains("<details><summary><b>Probes</b>"), "{text}");
        assert_eq!(text.matches("a &lt;b&gt; &amp; c").count(), 3);
        assert!(!text.contains("src=") && !text.contains("href="), "nothing is fetched");
    }
}
