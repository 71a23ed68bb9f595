//! Whether a certificate on disk is still the one that would be issued now. Pure over PEM text.

use std::{collections::BTreeSet, net::IpAddr};

use rcgen::PublicKeyData as _;
use x509_parser::{extensions::GeneralName, prelude::*};

use super::{LeafRequest, RENEW_BEFORE_DAYS};

/// Whether the certificate was signed by the authority, matches key and request, and does not end soon.
pub(super) fn still_good(
    certificate_pem: &str,
    key: &rcgen::KeyPair,
    authority_pem: &str,
    request: &LeafRequest,
    now: jiff::Timestamp,
) -> bool {
    let (Ok((_, leaf)), Ok((_, authority))) =
        (parse_x509_pem(certificate_pem.as_bytes()), parse_x509_pem(authority_pem.as_bytes()))
    else {
        return false;
    };
    let (Ok(leaf), Ok(authority)) = (leaf.parse_x509(), authority.parse_x509()) else { return false };
    key_identifier(&authority).is_some_and(|id| authority_identifier(&leaf) == Some(id))
        && leaf.validity().not_after.timestamp() > now.as_second() + RENEW_BEFORE_DAYS * 86_400
        && leaf.public_key().subject_public_key.data.as_ref() == key.der_bytes()
        && common_name(&leaf).as_deref() == Some(request.common_name.as_str())
        && organization(&leaf).as_deref() == request.organization.as_deref()
        && names(&leaf) == request.names.iter().cloned().collect()
}

fn key_identifier(certificate: &X509Certificate<'_>) -> Option<Vec<u8>> {
    certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    })
}

fn authority_identifier(certificate: &X509Certificate<'_>) -> Option<Vec<u8>> {
    certificate.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|id| id.0.to_vec()),
        _ => None,
    })
}

fn common_name(certificate: &X509Certificate<'_>) -> Option<String> {
    certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok()).map(str::to_owned)
}

fn organization(certificate: &X509Certificate<'_>) -> Option<String> {
    certificate.subject().iter_organization().next().and_then(|name| name.as_str().ok()).map(str::to_owned)
}

fn names(certificate: &X509Certificate<'_>) -> BTreeSet<String> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else { return BTreeSet::new() };
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => address(bytes).map(|address| address.to_string()),
        _ => None,
    };
    extension.value.general_names.iter().filter_map(name).collect()
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Some(bytes.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(Into::into)
}
