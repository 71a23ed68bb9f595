//! `$(VAR)` references as Kubernetes expands them in values, commands and arguments. Pure.

/// Replaces each `$(NAME)` that `lookup` knows; unknown ones stay as they are; `$$` gives `$`.
pub fn expand(text: &str, lookup: impl Fn(&str) -> Option<String>) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        let (before, from_dollar) = rest.split_at(dollar);
        expanded.push_str(before);
        if let Some(after) = from_dollar.strip_prefix("$$") {
            expanded.push('$');
            rest = after;
        } else if let Some((name, after)) =
            from_dollar.strip_prefix("$(").and_then(|reference| reference.split_once(')'))
        {
            if let Some(value) = lookup(name) {
                expanded.push_str(&value);
            } else {
                expanded.push_str("$(");
                expanded.push_str(name);
                expanded.push(')');
            }
            rest = after;
        } else {
            expanded.push('$');
            rest = from_dollar.strip_prefix('$').unwrap_or_default();
        }
    }
    expanded.push_str(rest);
    expanded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_escapes_and_leftovers() {
        let lookup = |name: &str| (name == "A").then(|| "1".to_owned());
        for (text, expected) in [
            ("x$(A)y", "x1y"),
            ("$$(A)", "$(A)"),
            ("$(B)", "$(B)"),
            ("$(A", "$(A"),
            ("cost: $5 $", "cost: $5 $"),
            ("$(A)$(A)", "11"),
        ] {
            assert_eq!(expand(text, lookup), expected, "{text}");
        }
    }
}
