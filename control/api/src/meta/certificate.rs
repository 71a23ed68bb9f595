//! Who may say what about a CertificateSigningRequest: `approval` writes Approved and Denied, `status` everything else.

use serde_json::{Value, json};

use super::carry;
use crate::value::{ensure_map, list, text};

fn is_approval(condition: &Value) -> bool {
    matches!(text(condition, "/type"), "Approved" | "Denied")
}

/// The stored request with the new one's conditions Approved and Denied.
pub(super) fn keep_all_but_approval(new: &mut Value, old: &Value) {
    let asked = std::mem::replace(new, old.clone());
    if let (Some(metadata), Some(asked)) = (new.get_mut("metadata"), asked.get("metadata"))
        && asked.get("managedFields").is_some()
    {
        carry(metadata, asked, "managedFields");
    }
    set_conditions(new, &asked, old);
}

/// The new status with the stored one's conditions Approved and Denied.
pub(super) fn keep_approval(new: &mut Value, old: &Value) {
    let asked = new.clone();
    set_conditions(new, old, &asked);
}

/// Approved and Denied of `approval`, then the other conditions of `rest`.
fn set_conditions(new: &mut Value, approval: &Value, rest: &Value) {
    let conditions = |object: &Value, wanted: bool| -> Vec<Value> {
        let all = list(object, "/status/conditions").iter();
        all.filter(|condition| is_approval(condition) == wanted).cloned().collect()
    };
    let mut all = conditions(approval, true);
    all.extend(conditions(rest, false));
    let Some(status) = ensure_map(new, "status") else { return };
    if all.is_empty() {
        status.remove("conditions");
    } else {
        status.insert("conditions".to_owned(), json!(all));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conditions(object: &Value) -> Vec<&str> {
        list(object, "/status/conditions").iter().map(|condition| text(condition, "/type")).collect()
    }

    #[test]
    fn an_approver_cannot_issue_and_a_signer_cannot_approve() {
        let stored = json!({"metadata": {"name": "a"}, "spec": {"request": "x"}, "status": {}});
        let all = json!([{"type": "Approved"}, {"type": "Failed"}]);
        let asked = json!({"metadata": {"name": "a"}, "spec": {"request": "y"}, "status": {"conditions": all, "certificate": "c"}});
        let mut approved = asked.clone();
        keep_all_but_approval(&mut approved, &stored);
        assert_eq!(conditions(&approved), ["Approved"]);
        assert_eq!(
            (&approved["spec"]["request"], approved["status"].get("certificate")),
            (&json!("x"), None)
        );
        let mut signed = asked;
        keep_approval(&mut signed, &stored);
        assert_eq!(conditions(&signed), ["Failed"]);
        assert_eq!(signed["status"]["certificate"], "c");
    }
}
