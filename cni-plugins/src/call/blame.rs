//! Finds the field that made a configuration undecodable, as the decoder's own error does not name it.
//!
//! By trial: the deepest value without which the object fails otherwise, or not at all, is to blame. Runs
//! only for an object that failed.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// Most decodings that are tried.
const TRIALS: usize = 2000;

/// The path of the field with `error`, as `ipam.ranges[0][0].subnet: `, or nothing when it is not found.
pub(super) fn field<T: DeserializeOwned>(config: &Value, error: &str) -> String {
    let mut trials = 0;
    let mut fails = |value: &Value| {
        trials += 1;
        trials <= TRIALS
            && serde_json::from_value::<T>(value.clone()).is_err_and(|found| found.to_string() == error)
    };
    let mut path = String::new();
    let mut pointer = String::new();
    while let Some((step, shown)) = culprit(config, &pointer, &mut fails) {
        pointer.push_str(&step);
        path.push_str(&shown);
    }
    if path.is_empty() { path } else { format!("{}: ", path.trim_start_matches('.')) }
}

/// The child of the value at `pointer` whose absence changes the outcome.
fn culprit(
    config: &Value,
    pointer: &str,
    fails: &mut impl FnMut(&Value) -> bool,
) -> Option<(String, String)> {
    let children: Vec<(String, String)> = match config.pointer(pointer)? {
        Value::Object(object) => object
            .keys()
            .map(|key| (format!("/{}", key.replace('~', "~0").replace('/', "~1")), format!(".{key}")))
            .collect(),
        Value::Array(list) => {
            (0..list.len()).map(|index| (format!("/{index}"), format!("[{index}]"))).collect()
        }
        _ => Vec::new(),
    };
    children.into_iter().find(|(step, _)| {
        let mut without = config.clone();
        let child = step.trim_start_matches('/').replace("~1", "/").replace("~0", "~");
        match without.pointer_mut(pointer) {
            Some(Value::Object(object)) => drop(object.remove(&child)),
            Some(Value::Array(list)) => {
                let Ok(index) = child.parse::<usize>() else { return false };
                drop(list.remove(index));
            }
            _ => return false,
        }
        !fails(&without)
    })
}

#[cfg(test)]
mod tests {
    use cni_plugins_types::ipam::IpamConfig;
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only whether it decodes matters")]
    struct Config {
        #[serde(default)]
        mtu: u32,
        ipam: IpamConfig,
    }

    #[track_caller]
    fn check(config: &Value, expected: &str) {
        let error = serde_json::from_value::<Config>(config.clone()).unwrap_err().to_string();
        assert_eq!(field::<Config>(config, &error), expected, "{error}");
    }

    #[test]
    fn the_deepest_field_is_named() {
        check(&json!({"mtu": "big", "ipam": {"subnet": "10.0.0.0/24"}}), "mtu: ");
        check(&json!({"mtu": 1, "ipam": {"subnet": "10.0.0.0/33"}}), "ipam.subnet: ");
        let ranges = json!([[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00::/64", "gateway": "x"}]]);
        check(&json!({"ipam": {"ranges": ranges}}), "ipam.ranges[1][0].gateway: ");
        check(&json!({"mtu": 1}), "");
    }
}
