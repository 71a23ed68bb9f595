//! Messages of the DRA plugin API, versions v1 and v1beta1, which differ in their package's name only.
//!
//! Facts: k8s.io/kubelet `pkg/apis/dra/v1`, `v1beta1` and `dra-health/v1alpha1`. Field numbers are the contract.

use std::collections::BTreeMap;

use prost::Message;

/// A version of the service that drivers may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// `v1.DRAPlugin`.
    V1,
    /// `v1beta1.DRAPlugin`.
    V1Beta1,
}

/// What a driver is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// To make claims ready.
    Prepare,
    /// To undo that.
    Unprepare,
}

impl Service {
    /// Newest first.
    pub const ALL: [Self; 2] = [Self::V1, Self::V1Beta1];

    /// As drivers tell it when they register.
    pub fn told(self) -> &'static str {
        match self {
            Self::V1 => "v1.DRAPlugin",
            Self::V1Beta1 => "v1beta1.DRAPlugin",
        }
    }

    /// The service's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin",
            Self::V1Beta1 => "k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin",
        }
    }

    /// Path of one of its methods.
    pub fn path(self, method: Method) -> &'static str {
        match (self, method) {
            (Self::V1, Method::Prepare) => "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodePrepareResources",
            (Self::V1, Method::Unprepare) => {
                "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodeUnprepareResources"
            }
            (Self::V1Beta1, Method::Prepare) => {
                "/k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin/NodePrepareResources"
            }
            (Self::V1Beta1, Method::Unprepare) => {
                "/k8s.io.kubelet.pkg.apis.dra.v1beta1.DRAPlugin/NodeUnprepareResources"
            }
        }
    }
}

impl Method {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepare => "NodePrepareResources",
            Self::Unprepare => "NodeUnprepareResources",
        }
    }
}

/// `NodePrepareResourcesRequest` and `NodeUnprepareResourcesRequest`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Claims {
    /// Which.
    #[prost(message, repeated, tag = "1")]
    pub claims: Vec<Claim>,
}

/// `Claim`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Claim {
    /// Namespace of the ResourceClaim.
    #[prost(string, tag = "1")]
    pub namespace: String,
    /// Its uid.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// Its name.
    #[prost(string, tag = "3")]
    pub name: String,
}

/// `NodePrepareResourcesResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Prepared {
    /// By uid of the claim.
    #[prost(btree_map = "string, message", tag = "1")]
    pub claims: BTreeMap<String, PreparedClaim>,
}

/// `NodePrepareResourceResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PreparedClaim {
    /// What containers get.
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
    /// Why not.
    #[prost(string, tag = "2")]
    pub error: String,
}

/// `Device`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Device {
    /// Requests that it is for; none: all of them.
    #[prost(string, repeated, tag = "1")]
    pub request_names: Vec<String>,
    /// Its pool.
    #[prost(string, tag = "2")]
    pub pool_name: String,
    /// Its name there.
    #[prost(string, tag = "3")]
    pub device_name: String,
    /// What the runtime is to be told.
    #[prost(string, repeated, tag = "4")]
    pub cdi_device_ids: Vec<String>,
    /// Which share of it.
    #[prost(string, optional, tag = "5")]
    pub share_id: Option<String>,
}

/// `NodeUnprepareResourcesResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Unprepared {
    /// By uid of the claim.
    #[prost(btree_map = "string, message", tag = "1")]
    pub claims: BTreeMap<String, UnpreparedClaim>,
}

/// `NodeUnprepareResourceResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct UnpreparedClaim {
    /// Why not.
    #[prost(string, tag = "1")]
    pub error: String,
}

/// `NodeWatchResources` of `v1alpha1.DRAResourceHealth`, which a driver may have beside its service.
pub const WATCH_HEALTH: &str = "/v1alpha1.DRAResourceHealth/NodeWatchResources";

/// `NodeWatchResourcesRequest`.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct WatchHealth {}

/// `NodeWatchResourcesResponse`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct HealthList {
    /// All of the driver's devices.
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<DeviceHealth>,
}

/// `DeviceHealth`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DeviceHealth {
    /// Which.
    #[prost(message, optional, tag = "1")]
    pub device: Option<DeviceId>,
    /// 1: healthy, 2: unhealthy, else nobody knows.
    #[prost(int32, tag = "2")]
    pub health: i32,
    /// When the driver found that out, in seconds since 1970.
    #[prost(int64, tag = "3")]
    pub last_updated_time: i64,
    /// Seconds that it holds; 0 or less: the usual.
    #[prost(int64, tag = "4")]
    pub health_check_timeout_seconds: i64,
    /// For people.
    #[prost(string, tag = "5")]
    pub message: String,
}

/// `DeviceIdentifier`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DeviceId {
    /// Its pool.
    #[prost(string, tag = "1")]
    pub pool_name: String,
    /// Its name there.
    #[prost(string, tag = "2")]
    pub device_name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as another implementation of the protocol writes them.
    #[test]
    fn fields_have_the_numbers_of_the_specification() {
        let claim = Claim { namespace: "n".to_owned(), uid: "u".to_owned(), name: "c".to_owned() };
        let request = Claims { claims: vec![claim] };
        assert_eq!(request.encode_to_vec(), [0x0a, 9, 0x0a, 1, b'n', 0x12, 1, b'u', 0x1a, 1, b'c']);
        let device = [0x0a, 1, b'r', 0x12, 1, b'p', 0x1a, 1, b'd', 0x22, 1, b'i'];
        let mut answer = vec![0x0a, 19, 0x0a, 1, b'u', 0x12, 14, 0x0a, 12];
        answer.extend(device);
        let answer = Prepared::decode(answer.as_slice()).unwrap();
        let found = &answer.claims["u"].devices[0];
        assert_eq!((found.request_names[0].as_str(), found.pool_name.as_str()), ("r", "p"));
        assert_eq!((found.device_name.as_str(), found.cdi_device_ids[0].as_str()), ("d", "i"));
        let refused = [0x0a, 8, 0x0a, 1, b'u', 0x12, 3, 0x0a, 1, b'e'];
        assert_eq!(Unprepared::decode(refused.as_slice()).unwrap().claims["u"].error, "e");
        let told = [0x0a, 14, 0x0a, 6, 0x0a, 1, b'p', 0x12, 1, b'd', 0x10, 2, 0x20, 9, 0x2a, 0];
        let told = HealthList::decode(told.as_slice()).unwrap().devices.remove(0);
        assert_eq!((told.health, told.health_check_timeout_seconds), (2, 9));
        assert_eq!(told.device.unwrap(), DeviceId { pool_name: "p".to_owned(), device_name: "d".to_owned() });
        // An entry without a value is an answer, too.
        assert!(Unprepared::decode([0x0a, 3, 0x0a, 1, b'u'].as_slice()).unwrap().claims.contains_key("u"));
    }
}
