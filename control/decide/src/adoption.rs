//! Which objects belong to a controller: adopt matching orphans, release what no longer matches.
//!
//! Input: the owner, its selector and the candidates' metadata. Output: who is owned, who must be adopted
//! and who released. Never decides about objects of another controller.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};

use crate::{object, selector};

/// What to do with one candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Already ours and still selected.
    Owned,
    /// Selected and without a controller: becomes ours once the owner reference is written.
    Adopt,
    /// Ours, but no longer selected: the owner reference must be removed.
    Release,
    /// Somebody else's, or simply not selected.
    Foreign,
}

/// Classifies one candidate for the owner.
///
/// An owner that is being deleted neither adopts nor releases; nothing that is being deleted is adopted
/// or released either, since that could only delay its end.
pub fn claim(owner: &ObjectMeta, owner_selector: &LabelSelector, candidate: &ObjectMeta) -> Claim {
    let matches =
        !selector::is_empty(owner_selector) && selector::matches(owner_selector, candidate.labels.as_ref());
    let frozen = object::is_being_deleted(owner) || object::is_being_deleted(candidate);
    match object::controller_of(candidate) {
        Some(controller) if controller.uid != object::uid(owner) => Claim::Foreign,
        Some(_) if matches || frozen => Claim::Owned,
        Some(_) => Claim::Release,
        None if matches && !frozen => Claim::Adopt,
        None => Claim::Foreign,
    }
}

/// The owner reference a controller writes into what it creates or adopts.
pub fn controller_reference(api_version: &str, kind: &str, owner: &ObjectMeta) -> OwnerReference {
    OwnerReference {
        api_version: api_version.into(),
        kind: kind.into(),
        name: object::name(owner).into(),
        uid: object::uid(owner).into(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;
    use crate::object::StringMap;

    fn meta(uid: &str, label: &str, controller: Option<&str>) -> ObjectMeta {
        ObjectMeta {
            uid: Some(uid.into()),
            labels: Some(StringMap::from([("app".into(), label.into())])),
            owner_references: controller.map(|uid| {
                vec![OwnerReference { uid: uid.into(), controller: Some(true), ..OwnerReference::default() }]
            }),
            ..ObjectMeta::default()
        }
    }

    #[test]
    fn claims_by_selector_and_controller() {
        let owner = meta("owner", "x", None);
        let mut dying = owner.clone();
        dying.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
        let web = LabelSelector {
            match_labels: Some(StringMap::from([("app".into(), "web".into())])),
            match_expressions: None,
        };
        for (description, owner, candidate, expected) in [
            ("orphan that matches", &owner, meta("p", "web", None), Claim::Adopt),
            ("orphan that does not match", &owner, meta("p", "db", None), Claim::Foreign),
            ("ours", &owner, meta("p", "web", Some("owner")), Claim::Owned),
            ("ours, relabelled", &owner, meta("p", "db", Some("owner")), Claim::Release),
            ("another controller's", &owner, meta("p", "web", Some("other")), Claim::Foreign),
            ("owner is being deleted", &dying, meta("p", "web", None), Claim::Foreign),
        ] {
            assert_eq!(claim(owner, &web, &candidate), expected, "{description}");
        }
    }
}
