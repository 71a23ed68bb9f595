//! Defaults of fields, upstream's where upstream has the field.

use std::net::IpAddr;
use std::path::PathBuf;

use super::GoDuration;

pub(super) fn any_address() -> IpAddr {
    IpAddr::from([0, 0, 0, 0])
}

pub(super) fn localhost() -> IpAddr {
    IpAddr::from([127, 0, 0, 1])
}

pub(super) fn default_port() -> u16 {
    10250
}

pub(super) fn default_proxy_healthz_port() -> u16 {
    10256
}

pub(super) fn default_proxy_metrics_port() -> u16 {
    10249
}

pub(super) fn default_healthz_port() -> u16 {
    10248
}

pub(super) fn default_endpoint() -> String {
    "unix:///run/keelson/cri.sock".to_owned()
}

pub(super) fn root_path() -> String {
    "/".to_owned()
}

pub(super) fn default_cgroup_driver() -> String {
    "cgroupfs".to_owned()
}

pub(super) fn default_cluster_domain() -> String {
    "cluster.local".to_owned()
}

pub(super) fn default_resolv_conf() -> PathBuf {
    PathBuf::from("/etc/resolv.conf")
}

pub(super) fn default_pod_logs_dir() -> PathBuf {
    PathBuf::from("/var/log/pods")
}

pub(super) fn default_log_links() -> PathBuf {
    PathBuf::from("/var/log/containers")
}

pub(super) fn default_root_dir() -> PathBuf {
    PathBuf::from("/var/lib/kubelet")
}

pub(super) fn default_tunnel() -> String {
    "kl-vxlan".to_owned()
}

pub(super) fn default_vni() -> u32 {
    1
}

pub(super) fn default_vxlan_port() -> u16 {
    8472
}

pub(super) fn default_instance() -> String {
    "default".to_owned()
}

pub(super) fn default_max_pods() -> u32 {
    110
}

pub(super) fn no_limit() -> i64 {
    -1
}

pub(super) fn yes() -> bool {
    true
}

pub(super) fn default_quota_period() -> GoDuration {
    GoDuration::from_millis(100)
}

pub(super) fn two_minutes() -> GoDuration {
    GoDuration::from_millis(120_000)
}

pub(super) fn ten_seconds() -> GoDuration {
    GoDuration::from_millis(10_000)
}

pub(super) fn default_lease_seconds() -> u32 {
    40
}

pub(super) fn twenty_seconds() -> GoDuration {
    GoDuration::from_millis(20_000)
}

pub(super) fn transition_period() -> GoDuration {
    GoDuration::from_millis(300_000)
}

pub(super) fn log_size() -> String {
    "10Mi".to_owned()
}

pub(super) fn log_files() -> i64 {
    5
}

pub(super) fn log_workers() -> i64 {
    1
}

pub(super) fn image_high() -> i64 {
    85
}

pub(super) fn image_low() -> i64 {
    80
}

pub(super) fn status_images() -> i64 {
    50
}

pub(super) fn default_network_name() -> String {
    "keelson".to_owned()
}
