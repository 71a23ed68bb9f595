//! The query of a log request. Pure.

use jiff::{SignedDuration, Timestamp};

use super::super::routes::Query;

/// What the client wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct LogOptions {
    /// Stay and send what is written later.
    pub(super) follow: bool,
    /// The instance before the current one.
    pub(super) previous: bool,
    /// Prefix lines with their time.
    pub(super) timestamps: bool,
    /// Only this many lines from the end.
    pub(super) tail: Option<u64>,
    /// Nothing older.
    pub(super) since: Option<Timestamp>,
    /// End after this many bytes.
    pub(super) limit: Option<u64>,
    /// Only this stream, `stdout` or `stderr`.
    pub(super) stream: Option<&'static str>,
}

impl LogOptions {
    /// Reads the query; errors are worded as upstream's validation.
    pub(super) fn parse(query: &Query, now: Timestamp) -> Result<Self, String> {
        let number = |name: &str, least: i64| match query.first(&[name]) {
            None => Ok(None),
            Some(text) => match text.parse::<i64>() {
                Ok(value) if value >= least => Ok(Some(value)),
                Ok(value) => {
                    Err(format!("{name}: Invalid value: {value}: must be greater than or equal to {least}"))
                }
                Err(_invalid) => Err(format!("{name}: Invalid value: {text:?}: must be an integer")),
            },
        };
        let since_seconds = number("sinceSeconds", 1)?;
        let since_time = query.first(&["sinceTime"]).map(str::parse::<Timestamp>).transpose();
        let since_time = since_time.map_err(|error| format!("sinceTime: Invalid value: {error}"))?;
        if since_seconds.is_some() && since_time.is_some() {
            return Err(
                "sinceTime: Forbidden: at most one of `sinceTime` or `sinceSeconds` may be specified"
                    .to_owned(),
            );
        }
        let since = since_time
            .or(since_seconds.and_then(|seconds| now.checked_sub(SignedDuration::from_secs(seconds)).ok()));
        let stream = match query.first(&["stream"]) {
            None | Some("All") => None,
            Some("Stdout") => Some("stdout"),
            Some("Stderr") => Some("stderr"),
            Some(other) => {
                return Err(format!(
                    "stream: Unsupported value: {other:?}: supported values: \"All\", \"Stdout\", \"Stderr\""
                ));
            }
        };
        let unsigned = |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok());
        Ok(Self {
            follow: query.is_on(&["follow"]),
            previous: query.is_on(&["previous"]),
            timestamps: query.is_on(&["timestamps"]),
            tail: unsigned(number("tailLines", 0)?),
            since,
            limit: unsigned(number("limitBytes", 1)?),
            stream,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<LogOptions, String> {
        let request = http::Request::builder().uri(format!("/x?{text}")).body(()).unwrap();
        LogOptions::parse(&Query::of(&request), "2026-01-01T00:01:00Z".parse().unwrap())
    }

    #[test]
    fn reads_what_kubectl_sends() {
        let options =
            parse("follow=true&tailLines=5&sinceSeconds=60&timestamps=true&limitBytes=9&stream=Stderr")
                .unwrap();
        assert!(options.follow && options.timestamps && !options.previous);
        assert_eq!((options.tail, options.limit, options.stream), (Some(5), Some(9), Some("stderr")));
        assert_eq!(options.since.unwrap().to_string(), "2026-01-01T00:00:00Z");
        assert_eq!(parse("").unwrap(), LogOptions::default());
    }

    #[test]
    fn refuses_nonsense_by_field() {
        for (text, message) in [
            ("tailLines=-1", "tailLines: Invalid value: -1: must be greater than or equal to 0"),
            ("limitBytes=0", "limitBytes: Invalid value: 0: must be greater than or equal to 1"),
            ("tailLines=x", "tailLines: Invalid value: \"x\": must be an integer"),
        ] {
            assert_eq!(parse(text).unwrap_err(), message);
        }
        assert!(parse("sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z").is_err());
    }
}
