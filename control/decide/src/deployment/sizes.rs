//! How many pods a Deployment may have and must keep: `replicas`, `maxSurge`, `maxUnavailable` in numbers.
//!
//! Percentages round up for surge and down for unavailability; both may not end at zero.

use k8s_openapi::{api::apps::v1::DeploymentSpec, apimachinery::pkg::util::intstr::IntOrString};

/// The numbers a rollout obeys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// `spec.replicas`.
    pub desired: i32,
    /// Pods allowed above `desired` during a rolling update; 0 with `Recreate`.
    pub surge: i32,
    /// Pods allowed to be missing during a rolling update; 0 with `Recreate`.
    pub unavailable: i32,
}

impl Sizes {
    /// Resolves the strategy's percentages.
    pub fn of(spec: &DeploymentSpec) -> Self {
        let desired = spec.replicas.unwrap_or(1).max(0);
        if is_recreate(spec) {
            return Sizes { desired, surge: 0, unavailable: 0 };
        }
        let rolling = spec.strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref());
        let default = IntOrString::String("25%".into());
        let surge = rolling.and_then(|rolling| rolling.max_surge.as_ref()).unwrap_or(&default);
        let unavailable = rolling.and_then(|rolling| rolling.max_unavailable.as_ref()).unwrap_or(&default);
        let surge = resolve(surge, desired, true);
        // Validation forbids both to be zero as written; rounding can still lead there.
        let unavailable = match resolve(unavailable, desired, false) {
            0 if surge == 0 => 1,
            unavailable => unavailable,
        };
        Sizes { desired, surge, unavailable: unavailable.min(desired) }
    }

    /// The most pods that may exist at any time.
    pub fn most(self) -> i32 {
        self.desired.saturating_add(self.surge)
    }

    /// The fewest pods that must be available at any time.
    pub fn fewest_available(self) -> i32 {
        self.desired - self.unavailable
    }
}

/// True for the strategy that ends all old pods before it starts new ones.
pub(super) fn is_recreate(spec: &DeploymentSpec) -> bool {
    spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate")
}

fn resolve(value: &IntOrString, total: i32, round_up: bool) -> i32 {
    match value {
        IntOrString::Int(number) => (*number).max(0),
        IntOrString::String(text) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let product = percent.max(0).saturating_mul(i64::from(total));
            let rounded = if round_up { product.saturating_add(99) / 100 } else { product / 100 };
            i32::try_from(rounded).unwrap_or(i32::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::apps::v1::{DeploymentStrategy, RollingUpdateDeployment};

    use super::*;

    fn sizes(replicas: i32, surge: IntOrString, unavailable: IntOrString) -> (i32, i32) {
        let sizes = Sizes::of(&DeploymentSpec {
            replicas: Some(replicas),
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(surge),
                    max_unavailable: Some(unavailable),
                }),
            }),
            ..DeploymentSpec::default()
        });
        (sizes.surge, sizes.unavailable)
    }

    #[test]
    fn percentages_round_as_documented() {
        let percent = |text: &str| IntOrString::String(text.into());
        assert_eq!(sizes(3, percent("25%"), percent("25%")), (1, 0));
        assert_eq!(sizes(10, percent("25%"), percent("25%")), (3, 2));
        assert_eq!(sizes(3, IntOrString::Int(0), percent("10%")), (0, 1), "both zero is not allowed");
        assert_eq!(sizes(2, IntOrString::Int(1), IntOrString::Int(5)), (1, 2));
        assert_eq!(sizes(0, percent("25%"), percent("25%")), (0, 0));
    }
}
