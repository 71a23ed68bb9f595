//! Who a container's first process is: from the CRI security context, the image and the image's passwd and group files.

use std::collections::BTreeSet;

use cri_shim_api::v1::{
    ContainerUser, LinuxContainerSecurityContext, LinuxContainerUser, SupplementalGroupsPolicy,
};

/// A user that cannot be found out.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// A name that the image's passwd file does not have.
    #[error("no user {0:?} in the image's /etc/passwd")]
    NoUser(String),
    /// A name that the image's group file does not have.
    #[error("no group {0:?} in the image's /etc/group")]
    NoGroup(String),
    /// A group without a user.
    #[error("run_as_group is given without run_as_user or run_as_username")]
    GroupWithoutUser,
    /// A number that is no user or group id.
    #[error("{0} is not a valid user or group id")]
    OutOfRange(i64),
}

/// The numbers a process starts with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Further groups, in ascending order, without duplicates.
    pub groups: Vec<u32>,
}

impl Identity {
    /// The same as CRI shows it.
    pub fn to_cri(&self) -> ContainerUser {
        ContainerUser {
            linux: Some(LinuxContainerUser {
                uid: self.uid.into(),
                gid: self.gid.into(),
                supplemental_groups: self.groups.iter().map(|gid| i64::from(*gid)).collect(),
            }),
        }
    }
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

fn passwd_entries(text: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = id(fields.nth(1)?)?;
        let gid = id(fields.next()?)?;
        Some(PasswdEntry { name, uid, gid })
    })
}

/// A user or group id of such a file.
fn id(text: &str) -> Option<u32> {
    // The highest value means "unchanged" to the kernel: an image must not keep root's identity under another name.
    text.parse().ok().filter(|id| *id < u32::MAX)
}

/// Lines of a group file as name, id and members.
fn group_entries(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = id(fields.nth(1)?)?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// Finds out the identity. `passwd` and `group` are the image's files, empty when it has none.
pub fn resolve(
    security: &LinuxContainerSecurityContext,
    image_user: &str,
    passwd: &str,
    group: &str,
) -> Result<Identity, UserError> {
    let (user, image_group) = wanted_user(security, image_user)?;
    let (uid, primary, name) = find_user(&user, passwd)?;
    let gid = match (&security.run_as_group, image_group) {
        (Some(gid), _) => to_id(gid.value)?,
        (None, Some(wanted)) => find_group(&wanted, group)?,
        (None, None) => primary,
    };
    let mut groups = BTreeSet::new();
    for gid in &security.supplemental_groups {
        groups.insert(to_id(*gid)?);
    }
    if security.supplemental_groups_policy() == SupplementalGroupsPolicy::Merge
        && let Some(name) = name
    {
        let member_of = |members: &str| members.split(',').any(|member| member.trim() == name);
        groups
            .extend(group_entries(group).filter(|(_, _, members)| member_of(members)).map(|(_, gid, _)| gid));
    }
    groups.insert(gid);
    Ok(Identity { uid, gid, groups: groups.into_iter().collect() })
}

/// The user as CRI or else the image names it, and the group the image adds to its user.
fn wanted_user(
    security: &LinuxContainerSecurityContext,
    image_user: &str,
) -> Result<(String, Option<String>), UserError> {
    if let Some(uid) = &security.run_as_user {
        return Ok((uid.value.to_string(), None));
    }
    if !security.run_as_username.is_empty() {
        return Ok((security.run_as_username.clone(), None));
    }
    if security.run_as_group.is_some() {
        return Err(UserError::GroupWithoutUser);
    }
    let (user, group) =
        image_user.split_once(':').map_or((image_user, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    Ok((user.to_owned(), group.filter(|group| !group.is_empty()).map(str::to_owned)))
}

/// User id, primary group and (where the passwd file has it) name of a user given as number or name.
fn find_user<'a>(user: &str, passwd: &'a str) -> Result<(u32, u32, Option<&'a str>), UserError> {
    if let Ok(number) = user.parse::<i64>() {
        let uid = to_id(number)?;
        let entry = passwd_entries(passwd).find(|entry| entry.uid == uid);
        return Ok(entry.map_or((uid, 0, None), |entry| (uid, entry.gid, Some(entry.name))));
    }
    passwd_entries(passwd)
        .find(|entry| entry.name == user)
        .map(|entry| (entry.uid, entry.gid, Some(entry.name)))
        .ok_or_else(|| UserError::NoUser(user.to_owned()))
}

fn find_group(wanted: &str, group: &str) -> Result<u32, UserError> {
    if let Ok(number) = wanted.parse::<i64>() {
        return to_id(number);
    }
    group_entries(group)
        .find(|(name, _, _)| *name == wanted)
        .map(|(_, gid, _)| gid)
        .ok_or_else(|| UserError::NoGroup(wanted.to_owned()))
}

fn to_id(number: i64) -> Result<u32, UserError> {
    // The highest value means "unchanged" to the kernel.
    u32::try_from(number).ok().filter(|id| *id < u32::MAX).ok_or(UserError::OutOfRange(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cri_shim_api::v1::Int64Value;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nwww-data:x:33:33::/var/www:/bin/false\n";
    const GROUP: &str = "root:x:0:\nadm:x:4:root,www-data\nwww-data:x:33:\nssl:x:101:www-data\n";

    fn context() -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext::default()
    }

    #[test]
    fn the_images_user_is_looked_up_with_its_groups() {
        let identity = resolve(&context(), "www-data", PASSWD, GROUP).unwrap();
        assert_eq!(identity, Identity { uid: 33, gid: 33, groups: vec![4, 33, 101] });
        let identity = resolve(&context(), "www-data:ssl", PASSWD, GROUP).unwrap();
        assert_eq!(identity.gid, 101);
        let identity = resolve(&context(), "", "", "").unwrap();
        assert_eq!(identity, Identity { uid: 0, gid: 0, groups: vec![0] });
    }

    #[test]
    fn cri_overrides_the_image_and_adds_groups() {
        let security = LinuxContainerSecurityContext {
            run_as_user: Some(Int64Value { value: 1000 }),
            run_as_group: Some(Int64Value { value: 2000 }),
            supplemental_groups: vec![3000],
            ..context()
        };
        let identity = resolve(&security, "www-data", PASSWD, GROUP).unwrap();
        assert_eq!(identity, Identity { uid: 1000, gid: 2000, groups: vec![2000, 3000] });
    }

    #[test]
    fn no_entry_of_the_image_keeps_the_identity_of_root() {
        let passwd = "sly:x:4294967295:4294967295::/:\n";
        assert_eq!(resolve(&context(), "sly", passwd, "").unwrap_err(), UserError::NoUser("sly".into()));
        let group = "sly:x:4294967295:www-data\n";
        assert_eq!(resolve(&context(), "0:sly", "", group).unwrap_err(), UserError::NoGroup("sly".into()));
        assert_eq!(resolve(&context(), "www-data", PASSWD, group).unwrap().groups, [33]);
    }

    #[test]
    fn strict_ignores_the_images_groups() {
        let mut security = context();
        security.set_supplemental_groups_policy(SupplementalGroupsPolicy::Strict);
        let identity = resolve(&security, "www-data", PASSWD, GROUP).unwrap();
        assert_eq!(identity.groups, [33]);
    }

    #[test]
    fn impossible_users_are_named() {
        assert_eq!(
            resolve(&context(), "nobody", PASSWD, GROUP).unwrap_err(),
            UserError::NoUser("nobody".into())
        );
        let lonely =
            LinuxContainerSecurityContext { run_as_group: Some(Int64Value { value: 1 }), ..context() };
        assert_eq!(resolve(&lonely, "", PASSWD, GROUP).unwrap_err(), UserError::GroupWithoutUser);
        let huge =
            LinuxContainerSecurityContext { run_as_user: Some(Int64Value { value: i64::MAX }), ..context() };
        assert_eq!(resolve(&huge, "", "", "").unwrap_err(), UserError::OutOfRange(i64::MAX));
    }
}
