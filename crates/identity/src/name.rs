//! Roles and names, as certificates carry them.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The longest name, in bytes: that of one label of a DNS name.
pub const NAME_BYTES_MAX: usize = 63;
/// What every name in a certificate ends with.
const SUFFIX: &str = ".ashlar";

/// What a process does in a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Speaks HTTP to clients.
    Gateway,
    /// Decides.
    Scheduler,
    /// Computes.
    Node,
    /// Hands certificates to machines that join.
    Enrolment,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 4] = [Role::Gateway, Role::Scheduler, Role::Node, Role::Enrolment];

    /// The word for it, in certificates and messages.
    pub const fn word(self) -> &'static str {
        match self {
            Role::Gateway => "gateway",
            Role::Scheduler => "scheduler",
            Role::Node => "node",
            Role::Enrolment => "enrolment",
        }
    }

    /// The role of a word.
    pub fn of_word(word: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.word() == word)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A name that no certificate can carry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` cannot be a name: take 1 to {NAME_BYTES_MAX} lowercase letters, digits and hyphens, with no hyphen at either end"
)]
pub struct NameError(String);

/// Who a process is: what its certificate says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    role: Role,
    name: String,
}

impl Identity {
    /// A role under a name.
    ///
    /// # Errors
    /// If the name is not one.
    pub fn new(role: Role, name: &str) -> Result<Identity, NameError> {
        let bytes = name.as_bytes();
        let length = (1..=NAME_BYTES_MAX).contains(&bytes.len());
        let letters = bytes.iter().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        if !length || !letters || name.starts_with('-') || name.ends_with('-') {
            // What an unknown peer sends is not repeated at any length.
            return Err(NameError(name.chars().take(NAME_BYTES_MAX + 1).collect()));
        }
        Ok(Identity { role, name: name.to_owned() })
    }

    /// Its role.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its name: unique among the processes of this role.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name in its certificate: `node-a.node.ashlar`.
    pub fn dns_name(&self) -> String {
        format!("{}.{}{SUFFIX}", self.name, self.role)
    }

    /// The identity of a name in a certificate.
    pub fn of_dns_name(name: &str) -> Option<Identity> {
        let (name, role) = name.strip_suffix(SUFFIX)?.split_once('.')?;
        Identity::new(Role::of_word(role)?, name).ok()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.name)
    }
}

/// A name for this machine, from what it calls itself; `None` where nothing of that can be a name.
pub fn of_machine() -> Option<String> {
    let uname = rustix::system::uname();
    let host = uname.nodename().to_string_lossy().to_lowercase();
    let first = host.split('.').next().unwrap_or_default();
    let kept: String = first.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let name = kept.trim_matches('-');
    let name = name.get(..NAME_BYTES_MAX).unwrap_or(name).trim_matches('-').to_owned();
    Identity::new(Role::Node, &name).ok().map(|identity| identity.name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_identity_comes_back_from_its_certificate_name() {
        for role in Role::ALL {
            let identity = Identity::new(role, "rack-7").unwrap();
            assert_eq!(Identity::of_dns_name(&identity.dns_name()), Some(identity));
        }
        for other in
            ["rack-7.ashlar", "rack-7.king.ashlar", "a.b.node.ashlar", "rack-7.node", ".node.ashlar", ""]
        {
            assert_eq!(Identity::of_dns_name(other), None, "{other}");
        }
    }

    #[test]
    fn what_cannot_be_a_label_cannot_be_a_name() {
        for name in ["", "-a", "a-", "A", "a.b", "a b", "ä", "a_b", &"x".repeat(64)] {
            let error = Identity::new(Role::Node, name).unwrap_err();
            assert!(error.to_string().contains("lowercase letters"), "{error}");
        }
        assert!(Identity::new(Role::Node, &"x".repeat(63)).is_ok());
    }
}
