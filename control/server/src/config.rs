//! What the server needs to know to start. Plain data; the binary fills it from its configuration file.

use std::{net::IpAddr, net::SocketAddr, ops::RangeInclusive};

use crate::{admission::allocator::Ipv4Range, pki::Identity};

/// Settings of the API server.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// The address under which pods reach the server, for the `kubernetes` EndpointSlice.
    pub advertise_address: IpAddr,
    /// Addresses of Services.
    pub service_range: Ipv4Range,
    /// Ports of NodePort Services.
    pub node_ports: RangeInclusive<u16>,
}

/// Keys and certificates of the API server.
#[derive(Clone)]
pub struct Credentials {
    /// The authority that signs clients and kubelets.
    pub authority_pem: String,
    /// The server's own certificate.
    pub serving: Identity,
    /// The client certificate that the server shows to kubelets.
    pub kubelet_client: Identity,
    /// The key that signs service account tokens, ECDSA P-256.
    pub service_account_key_pem: String,
}
