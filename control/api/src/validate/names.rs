//! Name, label and annotation syntax (RFC 1123 and 1035 labels, qualified names), with upstream's texts.
//!
//! Input: one string. Output: `None` or the reason, or all reasons. Uses no regular expressions: these run on every
//! label of every write.

/// Texts as upstream's validation package words them.
const LABEL_1123: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', \
     and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for \
     validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN_1123: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' \
     or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation \
     is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
     alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
     validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or \
     '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex \
     used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end \
     with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
     '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";

/// RFC 1123 label, at most 63 characters.
pub fn label_1123(name: &str) -> Option<String> {
    too_long(name, 63).or_else(|| (!is_label_1123(name)).then(|| LABEL_1123.to_owned()))
}

/// RFC 1123 subdomain, at most 253 characters.
pub fn subdomain_1123(name: &str) -> Option<String> {
    let valid = name.split('.').all(is_label_1123);
    too_long(name, 253).or_else(|| (!valid).then(|| SUBDOMAIN_1123.to_owned()))
}

/// RFC 1035 label, at most 63 characters.
pub fn label_1035(name: &str) -> Option<String> {
    let valid = is_label_1123(name) && name.starts_with(|c: char| c.is_ascii_lowercase());
    too_long(name, 63).or_else(|| (!valid).then(|| LABEL_1035.to_owned()))
}

/// A name that can be a path segment.
pub fn path_segment(name: &str) -> Option<String> {
    match name {
        "." => Some("may not be '.'".to_owned()),
        ".." => Some("may not be '..'".to_owned()),
        _ => name.chars().find(|c| matches!(c, '/' | '%')).map(|c| format!("may not contain '{c}'")),
    }
}

/// A label's value.
pub fn label_value(text: &str) -> Option<String> {
    let valid = text.is_empty() || is_name_part(text);
    too_long(text, 63).or_else(|| (!valid).then(|| LABEL_VALUE.to_owned()))
}

/// A label or annotation key: `[prefix/]name`; all reasons.
pub fn qualified_name(key: &str) -> Vec<String> {
    let mut reasons = Vec::new();
    let mut parts = key.split('/');
    let name = match (parts.next(), parts.next(), parts.next()) {
        (Some(name), None, _) => name,
        (Some(prefix), Some(name), None) => {
            if prefix.is_empty() {
                reasons.push("prefix part must be non-empty".to_owned());
            } else if let Some(why) = subdomain_1123(prefix) {
                reasons.push(format!("prefix part {why}"));
            }
            name
        }
        _ => {
            return vec![format!(
                "a qualified {} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')",
                QUALIFIED.replacen("name part ", "name ", 1)
            )];
        }
    };
    if name.is_empty() {
        reasons.push("name part must be non-empty".to_owned());
    } else if name.len() > 63 {
        reasons.push("name part must be no more than 63 bytes".to_owned());
    }
    if !is_name_part(name) {
        reasons.push(QUALIFIED.to_owned());
    }
    reasons
}

/// A port name (IANA service name).
pub fn port_name(name: &str) -> Vec<String> {
    let mut reasons = Vec::new();
    if name.len() > 15 {
        reasons.push("must be no more than 15 characters".to_owned());
    }
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !name.chars().all(legal) {
        reasons.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned());
    }
    if !name.contains(|c: char| c.is_ascii_lowercase()) {
        reasons.push("must contain at least one letter (a-z)".to_owned());
    }
    if name.contains("--") {
        reasons.push("must not contain consecutive hyphens".to_owned());
    }
    if name.starts_with('-') || name.ends_with('-') {
        reasons.push("must not begin or end with a hyphen".to_owned());
    }
    reasons
}

/// A key of a ConfigMap or Secret.
pub fn config_key(key: &str) -> Option<String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if let Some(why) = too_long(key, 253) {
        return Some(why);
    }
    if key.is_empty() || !key.chars().all(legal) {
        return Some(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
             'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
                .to_owned(),
        );
    }
    match key {
        "." => Some("must not be '.'".to_owned()),
        _ if key.starts_with("..") => Some("must not start with '..'".to_owned()),
        _ => None,
    }
}

/// An environment variable's name: anything printable but `=`.
pub fn env_name(name: &str) -> Option<String> {
    let legal = |c: char| (' '..='~').contains(&c) && c != '=';
    (!name.chars().all(legal)).then(|| {
        "a valid environment variable name must consist only of printable ASCII characters other than '='"
            .to_owned()
    })
}

fn too_long(text: &str, most: usize) -> Option<String> {
    (text.len() > most).then(|| format!("must be no more than {most} bytes"))
}

fn is_label_1123(label: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let (Some(first), Some(last)) = (label.bytes().next(), label.bytes().next_back()) else { return false };
    inner(first) && inner(last) && label.bytes().all(|b| inner(b) || b == b'-')
}

fn is_name_part(name: &str) -> bool {
    let (Some(first), Some(last)) = (name.bytes().next(), name.bytes().next_back()) else { return false };
    let inner = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    first.is_ascii_alphanumeric() && last.is_ascii_alphanumeric() && name.bytes().all(inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax_is_upstreams() {
        assert!(label_1123("my-name1").is_none());
        assert!(label_1123("My").is_some() && label_1123("-a").is_some() && label_1123("").is_some());
        assert!(subdomain_1123("a.b-c.d").is_none() && subdomain_1123("a..b").is_some());
        assert!(label_1035("a1").is_none() && label_1035("1a").is_some());
        assert!(qualified_name("example.com/My_Name.x").is_empty());
        assert!(!qualified_name("a/b/c").is_empty() && !qualified_name("/x").is_empty());
        assert!(label_value("").is_none() && label_value("a b").is_some());
        assert!(port_name("http-1").is_empty() && !port_name("8080").is_empty());
        assert!(
            config_key("a.b_c-d").is_none() && config_key("..x").is_some() && config_key("a/b").is_some()
        );
    }
}
