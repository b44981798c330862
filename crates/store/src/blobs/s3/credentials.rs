//! Who asks. Never shown, never logged.

use crate::blobs::error::BlobError;
use std::fmt;
use std::path::{Path, PathBuf};

/// Longest credentials file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// An access key of a service.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub(super) access_key: String,
    pub(super) secret_key: String,
    pub(super) session_token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(hidden)")
    }
}

impl Credentials {
    /// An access key, and the token that short-lived ones come with.
    ///
    /// # Errors
    /// [`BlobError::Invalid`] for an empty key and for characters that no header can carry.
    pub fn new(
        access_key: &str,
        secret_key: &str,
        session_token: Option<&str>,
    ) -> Result<Credentials, BlobError> {
        let good = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        if !good(access_key) || !good(secret_key) || !session_token.is_none_or(good) {
            return Err(BlobError::Invalid(
                "an access key, its secret or its token is empty or not of printable ascii: write it anew"
                    .into(),
            ));
        }
        Ok(Credentials {
            access_key: access_key.into(),
            secret_key: secret_key.into(),
            session_token: session_token.map(Into::into),
        })
    }

    /// From the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`), else from the profile
    /// `AWS_PROFILE` (or `default`) of the file `AWS_SHARED_CREDENTIALS_FILE` (or `~/.aws/credentials`).
    ///
    /// # Errors
    /// [`BlobError::Address`] if there are none.
    pub async fn find() -> Result<Credentials, BlobError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        if let (Some(access), Some(secret)) =
            (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY"))
        {
            return Credentials::new(&access, &secret, variable("AWS_SESSION_TOKEN").as_deref());
        }
        let home = || variable("HOME").map(|home| Path::new(&home).join(".aws/credentials"));
        let file = variable("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from).or_else(home);
        let profile = variable("AWS_PROFILE").unwrap_or_else(|| "default".into());
        match file {
            Some(file) => Credentials::from_file(&file, &profile).await,
            None => Err(BlobError::Address(
                "no credentials for s3, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".into(),
            )),
        }
    }

    /// From a profile of a file in Amazon's format.
    ///
    /// # Errors
    /// [`BlobError::Address`] if it is not there.
    pub async fn from_file(file: &Path, profile: &str) -> Result<Credentials, BlobError> {
        let missing = |why: &str| {
            let place = file.display();
            BlobError::Address(format!(
                "no credentials for s3, neither in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY nor in {place} ({why})"
            ))
        };
        let about = tokio::fs::metadata(file).await.map_err(|_| missing("it cannot be read"))?;
        if !about.is_file() || about.len() > FILE_BYTES_MAX {
            return Err(missing("it is no small file"));
        }
        let text = tokio::fs::read_to_string(file).await.map_err(|_| missing("it cannot be read"))?;
        let value = |name: &str| in_profile(&text, profile, name);
        match (value("aws_access_key_id"), value("aws_secret_access_key")) {
            (Some(access), Some(secret)) => Credentials::new(access, secret, value("aws_session_token")),
            _ => Err(missing("it has no such profile with both keys")),
        }
    }
}

/// The value of `name` below the line `[profile]`.
fn in_profile<'a>(text: &'a str, profile: &str, name: &str) -> Option<&'a str> {
    let heading = |line: &'a str| line.trim().strip_prefix('[')?.strip_suffix(']').map(str::trim);
    let mut lines = text.lines().skip_while(|line| heading(line) != Some(profile));
    lines.next()?;
    let mut own = lines.take_while(|line| heading(line).is_none());
    own.find_map(|line| {
        let (found, value) = line.split_once('=')?;
        (found.trim() == name).then_some(value.trim()).filter(|value| !value.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_read_from_its_own_lines() {
        let text = "# aws_access_key_id = no\n[default]\naws_access_key_id = A\naws_secret_access_key=b/+=\n\
                    [ other ]\r\naws_access_key_id=C\naws_secret_access_key=\n";
        assert_eq!(in_profile(text, "default", "aws_access_key_id"), Some("A"));
        assert_eq!(in_profile(text, "default", "aws_secret_access_key"), Some("b/+="));
        assert_eq!(in_profile(text, "default", "aws_session_token"), None);
        assert_eq!(in_profile(text, "other", "aws_access_key_id"), Some("C"));
        assert_eq!(in_profile(text, "other", "aws_secret_access_key"), None);
        assert_eq!(in_profile(text, "third", "aws_access_key_id"), None);
    }

    #[test]
    fn credentials_do_not_show_themselves() {
        let credentials = Credentials::new("hidden-a", "hidden-b", Some("hidden-c")).expect("good");
        assert!(!format!("{credentials:?}").contains("hidden-"));
        let error = Credentials::new("hidden-a", "hidden b\n", None).expect_err("a line break").to_string();
        assert!(!error.contains("hidden-a") && !error.contains("hidden b"), "{error}");
    }
}
