//! Counts what happens to images before containers start, for `/metrics`, under the kubelet's names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::snapshot;
use crate::runtime::images::PullPolicy;

/// How a look for credentials ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Check {
    /// The policy lets everybody use the image.
    Allowed,
    /// The pod has what the image was pulled with.
    Found,
    /// The registry has to be asked.
    MustAuthenticate,
    /// Nobody knows.
    Error,
}

/// What was found out about an image before it was decided what to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seen {
    /// It was on the node.
    pub(crate) present: Option<bool>,
    /// It had to be pulled.
    pub(crate) required: Option<bool>,
}

/// The counters.
#[derive(Debug, Default)]
pub struct PullCounters(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    ensured: BTreeMap<(&'static str, Seen), u64>,
    checks: BTreeMap<Check, u64>,
    /// Pulls under way and images pulled, where that is written down.
    directories: Option<(PathBuf, PathBuf)>,
}

/// A family of samples: name, kind, help, and labels with values.
pub type Family = (&'static str, &'static str, &'static str, Vec<(String, u64)>);

impl PullCounters {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody asked for an image.
    pub(crate) fn ensured(&self, policy: PullPolicy, seen: Seen) {
        let word = match policy {
            PullPolicy::Always => "always",
            PullPolicy::IfNotPresent => "ifnotpresent",
            PullPolicy::Never => "never",
        };
        *self.lock().ensured.entry((word, seen)).or_default() += 1;
    }

    pub(super) fn checked(&self, check: Check) {
        *self.lock().checks.entry(check).or_default() += 1;
    }

    /// Pulls under way, and images pulled, are the files of these directories.
    pub(super) fn count_files(&self, pulling: &Path, pulled: &Path) {
        self.lock().directories = Some((pulling.to_owned(), pulled.to_owned()));
    }

    /// All that was counted. Lists two directories.
    pub fn families(&self) -> Vec<Family> {
        let counts = self.lock();
        let word = |known: Option<bool>| known.map_or("unknown".to_owned(), |is_so| is_so.to_string());
        let ensured = counts.ensured.iter().map(|((policy, seen), count)| {
            let (present, required) = (word(seen.present), word(seen.required));
            let labels = format!(
                "{{present_locally=\"{present}\",pull_policy=\"{policy}\",pull_required=\"{required}\"}}"
            );
            (labels, *count)
        });
        let checks = counts.checks.iter().map(|(check, count)| {
            let result = match check {
                Check::Allowed => "credentialPolicyAllowed",
                Check::Found => "credentialRecordFound",
                Check::MustAuthenticate => "mustAuthenticate",
                Check::Error => "error",
            };
            (format!("{{result=\"{result}\"}}"), *count)
        });
        let files = |directory: fn(&(PathBuf, PathBuf)) -> &PathBuf| -> Vec<(String, u64)> {
            let found = counts.directories.as_ref().and_then(|known| snapshot(directory(known)).ok());
            found.map(|files| (String::new(), files.len() as u64)).into_iter().collect()
        };
        vec![
            (
                "kubelet_image_manager_ensure_image_requests_total",
                "counter",
                "Number of ensure-image requests processed by the kubelet.",
                ensured.collect(),
            ),
            (
                "kubelet_imagemanager_image_mustpull_checks_total",
                "counter",
                "Counter for how many times kubelet checked whether credentials need to be re-verified to access an image",
                checks.collect(),
            ),
            (
                "kubelet_imagemanager_ondisk_pullintents",
                "gauge",
                "Number of ImagePullIntents stored on disk.",
                files(|(pulling, _)| pulling),
            ),
            (
                "kubelet_imagemanager_ondisk_pulledrecords",
                "gauge",
                "Number of ImagePulledRecords stored on disk.",
                files(|(_, pulled)| pulled),
            ),
        ]
    }
}
