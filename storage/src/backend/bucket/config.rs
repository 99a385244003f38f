//! Which bucket, and what is shown to it.

use std::{
    fmt, fs, io,
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use object_store::{CredentialProvider, aws::AwsCredential};
use serde::{Deserialize, Serialize};

/// The longest file of credentials.
const CREDENTIALS_BYTES: u64 = 16 * 1024;
/// How long credentials that were read count.
const READ_EVERY: Duration = Duration::from_secs(60);

/// A bucket of a service that speaks S3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketConfig {
    /// Its name.
    pub bucket: String,
    /// Objects are kept below this: path segments of `[a-z0-9._-]`. Empty: at the top.
    #[serde(default)]
    pub prefix: String,
    /// The region, for signatures.
    #[serde(default = "default_region")]
    pub region: String,
    /// `https://HOST[:PORT]` of a service that is not AWS; plain http on loopback only.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// A file with `aws_access_key_id = ...`, `aws_secret_access_key = ...` and, if there is one, `aws_session_token = ...`,
    /// as `~/.aws/credentials` has them; it must not be readable by everybody, and is read again every minute. Absent: the
    /// role of the machine, which its cloud's metadata service gives (AWS).
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
    /// The authorities that may vouch for the service (PEM).
    #[serde(default = "default_ca_file")]
    pub ca_file: PathBuf,
}

fn default_region() -> String {
    "us-east-1".into()
}

fn default_ca_file() -> PathBuf {
    "/etc/ssl/certs/ca-certificates.crt".into()
}

/// What is wrong with a bucket's configuration.
#[derive(Debug, thiserror::Error)]
pub enum BucketError {
    /// A value.
    #[error("bucket: {field} {why}")]
    Value {
        /// Which.
        field: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// A file.
    #[error("bucket: cannot read {path}")]
    File {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The client cannot be made.
    #[error("bucket: the client cannot be made: {0}")]
    Client(String),
}

/// Whether names of objects may have this segment.
fn is_segment(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-');
    !text.is_empty() && !text.starts_with('.') && text.bytes().all(is_plain)
}

impl BucketConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// [`BucketError::Value`], with what is wrong.
    pub fn validate(&self) -> Result<(), BucketError> {
        let bad = |field, why| Err(BucketError::Value { field, why });
        let is_name = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
        if !(3..=63).contains(&self.bucket.len()) || !self.bucket.bytes().all(is_name) {
            return bad("bucket", "is not 3 to 63 of [a-z0-9.-]");
        }
        if self.bucket.ends_with("--x-s3") {
            return bad("bucket", "is a directory bucket, whose listings have no order: not supported");
        }
        if self.prefix.len() > 200 || !(self.prefix.is_empty() || self.prefix.split('/').all(is_segment)) {
            return bad("prefix", "is not up to 200 of path segments of [a-z0-9._-], with no slash at its ends");
        }
        let is_region = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if !(1..=64).contains(&self.region.len()) || !self.region.bytes().all(is_region) {
            return bad("region", "is not 1 to 64 of [a-z0-9-]");
        }
        if let Some(endpoint) = &self.endpoint {
            let Ok(url) = reqwest::Url::parse(endpoint) else { return bad("endpoint", "is no URL") };
            let is_bare = url.username().is_empty() && url.password().is_none() && url.query().is_none();
            if !is_bare || url.path() != "/" || url.host_str().is_none() {
                return bad("endpoint", "has more than https://HOST[:PORT]");
            }
            let is_loopback = matches!(url.host_str(), Some("127.0.0.1" | "localhost" | "[::1]"));
            match url.scheme() {
                "https" => {}
                "http" if is_loopback => {}
                _ => return bad("endpoint", "is not https (plain http is for loopback only)"),
            }
        }
        Ok(())
    }

    /// For messages: the service and the bucket, nothing secret.
    #[must_use]
    pub fn name(&self) -> String {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        let at = self.endpoint.as_deref().unwrap_or("AWS");
        format!("bucket {}{slash}{} at {at}", self.bucket, self.prefix)
    }
}

/// Credentials from a file, which somebody may replace while they are used.
pub(super) struct FileCredentials {
    path: PathBuf,
    known: Mutex<Option<(Instant, Arc<AwsCredential>)>>,
}

impl fmt::Debug for FileCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileCredentials({})", self.path.display())
    }
}

impl FileCredentials {
    pub(super) fn open(path: &Path) -> Result<Self, BucketError> {
        let first = read(path)?;
        let known = Mutex::new(Some((Instant::now(), Arc::new(first))));
        Ok(Self { path: path.to_owned(), known })
    }

    async fn get(&self) -> object_store::Result<Arc<AwsCredential>> {
        {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((at, credential)) = &*known
                && at.elapsed() < READ_EVERY
            {
                return Ok(Arc::clone(credential));
            }
        }
        let path = self.path.clone();
        let failed = |source| object_store::Error::Generic { store: "S3", source };
        let read = tokio::task::spawn_blocking(move || read(&path)).await.map_err(|error| failed(Box::new(error)))?;
        let credential = Arc::new(read.map_err(|error| failed(Box::new(error)))?);
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), Arc::clone(&credential)));
        Ok(credential)
    }
}

impl CredentialProvider for FileCredentials {
    type Credential = AwsCredential;

    // What the `async_trait` macro makes of it.
    fn get_credential<'life0, 'async_trait>(
        &'life0 self,
    ) -> std::pin::Pin<Box<dyn Future<Output = object_store::Result<Arc<AwsCredential>>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(self.get())
    }
}

/// Blocking.
fn read(path: &Path) -> Result<AwsCredential, BucketError> {
    let failed = |source| BucketError::File { path: path.display().to_string(), source };
    let file = fs::File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.permissions().mode() & 0o007 != 0 {
        return Err(BucketError::Value { field: "credentials_file", why: "is open to everybody: chmod o= FILE" });
    }
    let mut text = String::new();
    file.take(CREDENTIALS_BYTES).read_to_string(&mut text).map_err(failed)?;
    parse(&text)
}

/// The first section, or the one that is called `default`.
fn parse(text: &str) -> Result<AwsCredential, BucketError> {
    let (mut key_id, mut secret_key, mut token) = (None, None, None);
    let mut is_ours = true;
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            is_ours = section.trim_end_matches(']').trim() == "default";
            continue;
        }
        let Some((name, value)) = line.split_once('=').filter(|_| is_ours && !line.starts_with('#')) else { continue };
        let value = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
        match name.trim() {
            "aws_access_key_id" => key_id = value,
            "aws_secret_access_key" => secret_key = value,
            "aws_session_token" => token = value,
            _ => {}
        }
    }
    let missing = |why| BucketError::Value { field: "credentials_file", why };
    Ok(AwsCredential {
        key_id: key_id.ok_or_else(|| missing("has no aws_access_key_id in [default]"))?,
        secret_key: secret_key.ok_or_else(|| missing("has no aws_secret_access_key in [default]"))?,
        token,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> BucketConfig {
        BucketConfig {
            bucket: "chunks-1".into(),
            prefix: String::new(),
            region: default_region(),
            endpoint: None,
            credentials_file: None,
            ca_file: default_ca_file(),
        }
    }

    #[test]
    fn what_leads_elsewhere_is_refused() {
        config().validate().unwrap();
        for prefix in ["a", "a/b.c/d-e_f"] {
            BucketConfig { prefix: prefix.into(), ..config() }.validate().unwrap();
        }
        for prefix in ["/", "a/", "/a", "a//b", "..", "a/../b", "A", "a b", "é", &"a".repeat(201)] {
            assert!(BucketConfig { prefix: prefix.into(), ..config() }.validate().is_err(), "{prefix}");
        }
        for bucket in ["", "ab", "a/b", "A-B-C", "x@evil", "a?b=c", "name--use1-az1--x-s3", &"a".repeat(64)] {
            assert!(BucketConfig { bucket: bucket.into(), ..config() }.validate().is_err(), "{bucket}");
        }
        for endpoint in ["https://s3.example:9000", "https://s3.example/", "http://127.0.0.1:5000", "http://[::1]:1"] {
            BucketConfig { endpoint: Some(endpoint.into()), ..config() }.validate().unwrap();
        }
        for endpoint in ["http://s3.example", "s3.example", "ftp://h", "https://u:p@h", "https://h/a", "https://h?x=1"]
        {
            assert!(BucketConfig { endpoint: Some(endpoint.into()), ..config() }.validate().is_err(), "{endpoint}");
        }
        assert!(BucketConfig { region: "eu west".into(), ..config() }.validate().is_err());
    }

    #[test]
    fn credentials_are_read_as_aws_has_them_and_never_shown() {
        let plain = parse("aws_access_key_id = AK\naws_secret_access_key=se=cret\n").unwrap();
        assert_eq!((plain.key_id.as_str(), plain.secret_key.as_str(), plain.token.as_deref()), ("AK", "se=cret", None));
        let text = "[other]\naws_access_key_id = NO\n# c\n[default]\naws_access_key_id=AK\naws_secret_access_key = s\n\
                    aws_session_token = t\n[more]\naws_access_key_id = NO\n";
        let found = parse(text).unwrap();
        assert_eq!((found.key_id.as_str(), found.token.as_deref()), ("AK", Some("t")));
        assert!(!format!("{plain:?}").contains("se=cret"));
        for bad in
            ["", "aws_access_key_id = x", "[other]\naws_access_key_id=a\naws_secret_access_key=b", "aws_access_key_id="]
        {
            assert!(matches!(parse(bad), Err(BucketError::Value { .. })), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_file_that_everybody_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("credentials");
        fs::write(&path, "aws_access_key_id=a\naws_secret_access_key=b\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(FileCredentials::open(&path), Err(BucketError::Value { .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let credentials = FileCredentials::open(&path).unwrap();
        assert_eq!(credentials.get().await.unwrap().key_id, "a");
        // Rotated: seen when what was read has aged.
        fs::write(&path, "aws_access_key_id=c\naws_secret_access_key=d\n").unwrap();
        assert_eq!(credentials.get().await.unwrap().key_id, "a");
        *credentials.known.lock().unwrap() = None;
        assert_eq!(credentials.get().await.unwrap().key_id, "c");
        assert!(!format!("{credentials:?}").contains('d') || format!("{credentials:?}").contains("credentials"));
        assert!(matches!(FileCredentials::open(&folder.path().join("none")), Err(BucketError::File { .. })));
    }
}
