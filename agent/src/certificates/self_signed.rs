//! A serving certificate that nobody else has signed: for nodes that are given none. Blocks.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use x509_parser::pem::parse_x509_pem;

use crate::files;

/// Life of the certificate.
const DAYS: i64 = 365;
/// One that ends sooner is replaced at the start.
const RENEW_BEFORE_DAYS: i64 = 30;

/// Certificate and key below `directory`, as upstream names them; made where they are missing, do not fit each other, or end
/// soon.
pub(super) fn ensure(
    directory: &Path,
    names: &[String],
    now: jiff::Timestamp,
) -> anyhow::Result<(PathBuf, PathBuf)> {
    let (cert, key) = (directory.join("kubelet.crt"), directory.join("kubelet.key"));
    let known = files::read(&cert).and_then(|cert| Ok((cert, files::read(&key)?)));
    let known = known.with_context(|| format!("cannot read the certificates in {}", directory.display()))?;
    if let (Some(cert_pem), Some(key_pem)) = known
        && is_good(&cert_pem, &key_pem, now)
    {
        return Ok((cert, key));
    }
    let (cert_pem, key_pem) = make(names, now).context("cannot make a serving certificate")?;
    let failed = || format!("cannot write the serving certificate to {}", directory.display());
    files::write_private(&key, &key_pem).with_context(failed)?;
    files::write_private(&cert, &cert_pem).with_context(failed)?;
    Ok((cert, key))
}

fn is_good(cert_pem: &str, key_pem: &str, now: jiff::Timestamp) -> bool {
    let Ok((_, pem)) = parse_x509_pem(cert_pem.as_bytes()) else { return false };
    let ends = pem.parse_x509().map(|certificate| certificate.validity().not_after.timestamp());
    let fits = crate::server::Serving::from_pem(&format!("{cert_pem}\n{key_pem}")).is_ok();
    fits && ends.is_ok_and(|ends| ends > now.as_second() + RENEW_BEFORE_DAYS * 86_400)
}

fn make(names: &[String], now: jiff::Timestamp) -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(names.to_vec())?;
    let name = names.first().map_or("kubelet", String::as_str);
    params.distinguished_name.push(DnType::CommonName, format!("{name}@{}", now.as_second()));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let today = now.to_zoned(jiff::tz::TimeZone::UTC).date();
    let day = |offset: i64| {
        let date = today.saturating_add(jiff::Span::new().days(offset));
        rcgen::date_time_ymd(i32::from(date.year()), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    // From yesterday on, so that a clock that is a little behind accepts it.
    params.not_before = day(-1);
    params.not_after = day(DAYS);
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_once_and_again_before_it_ends() {
        let directory = tempfile::tempdir().unwrap();
        let names = ["n1".to_owned(), "10.0.0.1".to_owned()];
        let now = jiff::Timestamp::now();
        let made = |now| {
            let (cert, _) = ensure(directory.path(), &names, now).unwrap();
            std::fs::read_to_string(cert).unwrap()
        };
        let first = made(now);
        assert_eq!(made(now), first);
        let later = made(now + jiff::SignedDuration::from_hours(24 * 340));
        assert_ne!(later, first);
        std::fs::write(directory.path().join("kubelet.key"), "nonsense").unwrap();
        let mended = made(now);
        assert_ne!(mended, later, "a key that does not fit");
        assert_eq!(made(now), mended);
    }
}
