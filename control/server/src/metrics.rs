//! Counters in the Prometheus text format: requests, their latency, open watches.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// Upper bounds of the latency histogram, in milliseconds.
const BUCKETS: [u64; 9] = [1, 5, 10, 25, 50, 100, 500, 1000, 10_000];

#[derive(Default)]
struct Latency {
    buckets: [u64; BUCKETS.len()],
    count: u64,
    sum: Duration,
}

type RequestKey = (&'static str, String, u16);

#[derive(Default)]
struct Counters {
    requests: BTreeMap<RequestKey, u64>,
    latency: BTreeMap<&'static str, Latency>,
    watches: BTreeMap<&'static str, i64>,
}

/// Handle of the counters.
#[derive(Clone, Default)]
pub(crate) struct Metrics(Arc<Mutex<Counters>>);

/// Counts one open watch for as long as it lives.
pub(crate) struct Gauge {
    metrics: Metrics,
    resource: &'static str,
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.metrics.add_watch(self.resource, -1);
    }
}

impl Metrics {
    /// A request has been answered. `resource` must come from a fixed set, so that the map stays small.
    pub(crate) fn request(&self, verb: &'static str, resource: &str, code: u16, took: Duration) {
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counters.requests.entry((verb, resource.to_owned(), code)).or_default() += 1;
        if verb == "watch" {
            return;
        }
        let latency = counters.latency.entry(verb).or_default();
        latency.count += 1;
        latency.sum += took;
        let limits = BUCKETS.map(Duration::from_millis);
        for (bucket, _) in latency.buckets.iter_mut().zip(limits).filter(|(_, limit)| took <= *limit) {
            *bucket += 1;
        }
    }

    /// A watch begins; it ends when the gauge is dropped.
    pub(crate) fn watch_opened(&self, resource: &'static str) -> Gauge {
        self.add_watch(resource, 1);
        Gauge { metrics: self.clone(), resource }
    }

    fn add_watch(&self, resource: &'static str, by: i64) {
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counters.watches.entry(resource).or_default() += by;
    }

    /// Everything as text.
    pub(crate) fn render(&self) -> String {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = String::from("# TYPE apiserver_request_total counter\n");
        // Writing to a String cannot fail.
        let mut line = |text: std::fmt::Arguments<'_>| out.write_fmt(text).unwrap_or_default();
        for ((verb, resource, code), count) in &counters.requests {
            line(format_args!(
                "apiserver_request_total{{verb=\"{verb}\",resource=\"{resource}\",code=\"{code}\"}} {count}\n"
            ));
        }
        line(format_args!("# TYPE apiserver_request_duration_seconds histogram\n"));
        for (verb, latency) in &counters.latency {
            for (bucket, limit) in latency.buckets.iter().zip(BUCKETS) {
                let limit = Duration::from_millis(limit).as_secs_f64();
                line(format_args!(
                    "apiserver_request_duration_seconds_bucket{{verb=\"{verb}\",le=\"{limit}\"}} {bucket}\n"
                ));
            }
            let (count, sum) = (latency.count, latency.sum.as_secs_f64());
            line(format_args!(
                "apiserver_request_duration_seconds_bucket{{verb=\"{verb}\",le=\"+Inf\"}} {count}\n\
                 apiserver_request_duration_seconds_sum{{verb=\"{verb}\"}} {sum}\n\
                 apiserver_request_duration_seconds_count{{verb=\"{verb}\"}} {count}\n"
            ));
        }
        line(format_args!("# TYPE apiserver_longrunning_requests gauge\n"));
        for (resource, open) in &counters.watches {
            line(format_args!(
                "apiserver_longrunning_requests{{verb=\"WATCH\",resource=\"{resource}\"}} {open}\n"
            ));
        }
        out
    }
}
