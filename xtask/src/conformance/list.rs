//! Lists of case ids with reasons: what a reference is known to fail, and what not to run.
//!
//! One case a line, `group: name = reason`; `#` begins a comment. An id that no case has is an error, so that a list
//! cannot outlive its cases.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Ids and reasons.
pub(crate) type List = BTreeMap<String, String>;

/// Reads a list and checks its ids.
pub(crate) fn load(file: &Path, known: &[String]) -> Result<List> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let list = parse(&text).with_context(|| format!("in {}", file.display()))?;
    for id in list.keys() {
        if !known.contains(id) {
            bail!("{}: no case is called {id:?}", file.display());
        }
    }
    Ok(list)
}

fn parse(text: &str) -> Result<List> {
    let mut list = List::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((id, reason)) = line.split_once(" = ") else {
            bail!("line {}: expected `group: name = reason`, found {line:?}", number + 1);
        };
        if list.insert(id.trim().to_owned(), reason.trim().to_owned()).is_some() {
            bail!("line {}: {id:?} is listed twice", number + 1);
        }
    }
    Ok(list)
}

/// Whether a case is wanted: every word of the filter is in its id, whatever the case of the letters. A `|` in the
/// filter separates alternatives.
pub(crate) fn matches(id: &str, filter: &str) -> bool {
    let id = id.to_lowercase();
    filter.split('|').any(|words| words.split_whitespace().all(|word| id.contains(&word.to_lowercase())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_ids_reasons_and_comments() {
        let list = parse("# why\n\nexec sync: a = b = c\nlogs: x = y\n").unwrap();
        assert_eq!(list["exec sync: a"], "b = c");
        assert_eq!(list["logs: x"], "y");
    }

    #[test]
    fn a_line_without_a_reason_or_given_twice_is_an_error() {
        assert!(parse("exec sync: a\n").unwrap_err().to_string().contains("line 1"));
        assert!(parse("a: b = c\na: b = d\n").unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn a_filter_is_words_and_alternatives() {
        assert!(matches("Exec sync: the tree is gone", "exec TREE"));
        assert!(!matches("Exec sync: the tree is gone", "exec logs"));
        assert!(matches("Exec sync: the tree is gone", "logs|tree"));
        assert!(matches("anything", ""));
    }
}
