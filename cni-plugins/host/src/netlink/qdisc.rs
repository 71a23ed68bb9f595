//! Queueing disciplines: the token bucket (`tc … tbf`).

use nix::errno::Errno;

use super::{
    Netlink, NetlinkError, Step,
    codec::{Message, attributes, find, text, u32_at},
};

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_GETQDISC: u16 = 38;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const TC_H_ROOT: u32 = u32::MAX;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`: the kernel then needs no table of rates from us.
const ETHERNET: u8 = 1;

/// Limits of a token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenBucket {
    /// Bytes per second.
    pub rate: u64,
    /// Bytes that may pass at once.
    pub burst: u32,
    /// Bytes that may wait.
    pub limit: u32,
}

/// A root queueing discipline that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qdisc {
    /// Its kind, `tbf`.
    pub kind: String,
    /// Bytes per second, of a token bucket.
    pub rate: Option<u64>,
}

impl Step {
    /// Makes a token bucket the root discipline of link `index`.
    pub fn set_token_bucket(index: u32, bucket: TokenBucket) -> Self {
        let rate = u32::try_from(bucket.rate).unwrap_or(u32::MAX);
        let wide = u32::try_from(bucket.rate).is_err().then_some(bucket.rate);
        // tc_tbf_qopt: two tc_ratespec of 12 bytes (rate and peak rate), limit, buffer, mtu.
        let mut parameters = [0; 36];
        parameters[1] = ETHERNET;
        parameters[8..12].copy_from_slice(&rate.to_ne_bytes());
        parameters[24..28].copy_from_slice(&bucket.limit.to_ne_bytes());
        let message = Message::new(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE)
            .header(&header(index))
            .string(TCA_KIND, "tbf")
            .nested(TCA_OPTIONS, |options| {
                options
                    .attr(TCA_TBF_PARMS, &parameters)
                    .when(wide, |options, rate| options.u64(TCA_TBF_RATE64, rate))
                    .u32(TCA_TBF_BURST, bucket.burst)
            });
        Step::new(format!("limit the rate of link {index}"), message)
    }

    /// Takes the root discipline of link `index` away; absence is tolerated.
    pub fn delete_root_qdisc(index: u32) -> Self {
        let message = Message::new(RTM_DELQDISC, 0).header(&header(index));
        Step::new(format!("remove the rate limit of link {index}"), message).tolerating(Errno::ENOENT)
    }
}

impl Netlink {
    /// The root discipline of link `index`.
    pub fn root_qdisc(&self, index: u32) -> Result<Option<Qdisc>, NetlinkError> {
        let mut found = None;
        let request = Message::new(RTM_GETQDISC, 0).header(&header(index));
        self.dump("list queueing disciplines", &request, |body| {
            if u32_at(body, 4) == Some(index) && u32_at(body, 12) == Some(TC_H_ROOT) {
                found = read(body.get(20..).unwrap_or_default());
            }
        })?;
        Ok(found)
    }
}

fn read(bytes: &[u8]) -> Option<Qdisc> {
    let kind = find(bytes, TCA_KIND).map(text)?;
    let options = find(bytes, TCA_OPTIONS).unwrap_or_default();
    let mut rate = None;
    if kind == "tbf" {
        for (option, payload) in attributes(options) {
            match option {
                TCA_TBF_PARMS if rate.is_none() => rate = u32_at(payload, 8).map(u64::from),
                TCA_TBF_RATE64 => rate = payload.try_into().ok().map(u64::from_ne_bytes),
                _ => {}
            }
        }
    }
    Some(Qdisc { kind, rate })
}

/// `tcmsg` for the root of a link.
fn header(index: u32) -> [u8; 20] {
    let mut header = [0; 20];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[12..16].copy_from_slice(&TC_H_ROOT.to_ne_bytes());
    header
}
