//! Authentication: a verified client certificate (CN is the user, O are the groups), else a bearer token; and
//! impersonation (`kubectl --as`), for whom the policy allows it.

use http::{HeaderMap, header};
use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use control_api::status::{ApiError, Reason};

use super::{AUTHENTICATED, MASTERS, User};

/// The user that a client certificate names. The TLS layer has verified the certificate already.
pub(crate) fn certificate_user(certificate: &CertificateDer<'_>) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let mut groups: Vec<String> =
        subject.iter_organization().filter_map(|group| group.as_str().ok()).map(str::to_owned).collect();
    groups.push(AUTHENTICATED.to_owned());
    Some(User { name, uid: String::new(), groups, extra: Vec::new() })
}

/// The bearer token of a request.
pub(crate) fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim()).filter(|token| !token.is_empty())
}

/// The user that a request is to be served as: the `Impersonate-*` headers' where there are any and `user` may
/// impersonate, else `user`. Service accounts get their groups as with a token of theirs.
pub(crate) fn impersonate(user: User, headers: &HeaderMap) -> Result<User, ApiError> {
    let values = |name: &str| -> Vec<String> {
        headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
    };
    let asked = headers.keys().any(|name| name.as_str().starts_with("impersonate-"));
    if !asked {
        return Ok(user);
    }
    let Some(name) = values("impersonate-user").into_iter().next() else {
        let message = "requested impersonation without a user: the header Impersonate-User is missing";
        return Err(ApiError::new(Reason::BadRequest, message));
    };
    if !user.is_in(MASTERS) {
        let message = format!(
            "users \"{name}\" is forbidden: User \"{}\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope",
            user.name
        );
        return Err(ApiError::new(Reason::Forbidden, message));
    }
    let mut groups = values("impersonate-group");
    if let Some(account) = name.strip_prefix("system:serviceaccount:") {
        let namespace = account.split(':').next().unwrap_or_default();
        groups.push("system:serviceaccounts".to_owned());
        groups.push(format!("system:serviceaccounts:{namespace}"));
    }
    if !groups.iter().any(|group| group == AUTHENTICATED) {
        groups.push(AUTHENTICATED.to_owned());
    }
    let uid = values("impersonate-uid").into_iter().next().unwrap_or_default();
    Ok(User { name, uid, groups, extra: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(groups: &[&str]) -> User {
        let groups = groups.iter().map(|group| (*group).to_owned()).collect();
        User { name: "caller".to_owned(), uid: String::new(), groups, extra: Vec::new() }
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        pairs.collect::<Vec<(header::HeaderName, header::HeaderValue)>>().into_iter().collect()
    }

    #[test]
    fn without_headers_the_caller_stays() {
        assert_eq!(impersonate(user(&[MASTERS]), &headers(&[])).unwrap().name, "caller");
    }

    #[test]
    fn a_master_becomes_the_other_and_loses_its_own_groups() {
        let asked = headers(&[("impersonate-user", "system:serviceaccount:default:web")]);
        let other = impersonate(user(&[MASTERS]), &asked).unwrap();
        assert_eq!(other.name, "system:serviceaccount:default:web");
        assert!(other.groups.contains(&"system:serviceaccounts:default".to_owned()));
        assert!(!other.groups.contains(&MASTERS.to_owned()));
    }

    #[test]
    fn others_are_refused() {
        let asked = headers(&[("impersonate-user", "root")]);
        assert_eq!(impersonate(user(&["dev"]), &asked).unwrap_err().reason, Reason::Forbidden);
        let groups_only = headers(&[("impersonate-group", MASTERS)]);
        assert_eq!(impersonate(user(&[MASTERS]), &groups_only).unwrap_err().reason, Reason::BadRequest);
    }
}
