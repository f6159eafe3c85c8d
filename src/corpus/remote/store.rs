//! Object stores behind a blocking face: the only place that knows of asynchronous code.

use super::transport::{Failure, Transport};
use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig};
use std::error::Error as _;
use std::fmt;
use std::ops::Range;
use tokio::runtime::{Builder, Runtime};

/// Prefixes of the environment variables that stores are set up from.
const SETTINGS: [&str; 3] = ["AWS_", "AZURE_", "GOOGLE_"];
/// Parts of the names of variables whose values may be shown.
const PUBLIC: [&str; 5] = ["REGION", "ENDPOINT", "ALLOW_HTTP", "SKIP_SIGNATURE", "PATH"];

/// What a store did not do. The message holds no secrets.
#[derive(Debug)]
pub(super) struct StoreError(String);

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Error> for StoreError {
    fn from(error: Error) -> Self {
        Self(redact(describe(&error)))
    }
}

/// A bucket, a container or a web server.
pub(super) struct Store {
    runtime: Runtime,
    objects: Box<dyn ObjectStore>,
    web: bool,
}

impl fmt::Debug for Store {
    /// Settings hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

/// A file that a store lists.
pub(super) struct Listed {
    pub(super) key: String,
    pub(super) length: u64,
    pub(super) tag: Option<String>,
}

impl From<ObjectMeta> for Listed {
    fn from(meta: ObjectMeta) -> Self {
        Self { key: meta.location.to_string(), length: meta.size, tag: meta.e_tag }
    }
}

impl Store {
    /// The store at a root such as `s3://bucket/`, set up from the usual environment variables.
    pub(super) fn open(root: &str) -> Result<Self, StoreError> {
        let runtime = Builder::new_current_thread().enable_time().build();
        let runtime = runtime.map_err(|error| StoreError(error.to_string()))?;
        let web = root.starts_with("http");
        Ok(Self { runtime, objects: objects(root)?, web })
    }

    /// All objects below a prefix.
    pub(super) fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        if self.web {
            return Ok(Vec::new());
        }
        let prefix = Path::parse(prefix).map_err(Error::from)?;
        let listed = self.objects.list(Some(&prefix)).map_ok(Listed::from);
        Ok(self.runtime.block_on(listed.try_collect())?)
    }

    /// The object of a key, if there is one.
    pub(super) fn find(&self, key: &str) -> Result<Option<Listed>, StoreError> {
        match self.runtime.block_on(self.objects.head(&self.path(key)?)) {
            Ok(meta) => Ok(Some(Listed { key: key.into(), ..meta.into() })),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The bytes of a range of an object that is still the one that was listed.
    pub(super) fn range(&self, key: &str, range: Range<u64>, tag: Option<&str>) -> Result<Bytes, StoreError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..GetOptions::default() };
        let path = self.path(key)?;
        let get = async {
            let result = self.objects.get_opts(&path, options).await?;
            let now = result.meta.e_tag.clone();
            Ok::<_, Error>((now, result.bytes().await?))
        };
        let (now, bytes) = self.runtime.block_on(get)?;
        // Some stores list tags without the quotes that they are sent with.
        let bare = |tag: &str| tag.trim_matches('"').to_owned();
        if let (Some(then), Some(now)) = (tag, now)
            && bare(then) != bare(&now)
        {
            return Err(StoreError("the file has changed since it was listed".into()));
        }
        let (length, wanted) = (bytes.len() as u64, range.end - range.start);
        if length != wanted {
            return Err(StoreError(format!("the store gave {length} of {wanted} bytes")));
        }
        Ok(bytes)
    }

    /// A part of a key as people write it.
    pub(super) fn name(&self, part: &str) -> String {
        if !self.web {
            return part.into();
        }
        Path::from_url_path(part).map_or_else(|_| part.into(), |path| path.to_string())
    }

    /// Keys of web servers are addresses, in which characters may be encoded.
    fn path(&self, key: &str) -> Result<Path, StoreError> {
        let path = if self.web { Path::from_url_path(key) } else { Path::parse(key) };
        Ok(path.map_err(Error::from)?)
    }
}

fn objects(root: &str) -> Result<Box<dyn ObjectStore>, StoreError> {
    // Every request is repeated, where that may help, by the transport, and by nobody else.
    let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
    let transport =
        Transport::new(root.starts_with("http")).map_err(|failure| StoreError(failure.to_string()))?;
    let scheme = root.split("://").next().unwrap_or_default();
    Ok(match scheme {
        "s3" => {
            let builder = AmazonS3Builder::from_env().with_url(root).with_retry(once);
            Box::new(builder.with_http_connector(transport).build()?)
        }
        "gs" => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(root).with_retry(once);
            Box::new(builder.with_http_connector(transport).build()?)
        }
        "az" => {
            let builder = MicrosoftAzureBuilder::from_env().with_url(root).with_retry(once);
            Box::new(builder.with_http_connector(transport).build()?)
        }
        _ => {
            let builder = HttpBuilder::new().with_url(root).with_retry(once);
            Box::new(builder.with_http_connector(transport).build()?)
        }
    })
}

/// What an error says, without the requests that other libraries put into their messages.
fn describe(error: &Error) -> String {
    let mut source = error.source();
    while let Some(inner) = source {
        if let Some(failure) = inner.downcast_ref::<Failure>() {
            return failure.to_string();
        }
        source = inner.source();
    }
    match error {
        Error::NotFound { .. } => "there is no such file or bucket".into(),
        Error::PermissionDenied { .. } => "access is denied".into(),
        Error::Unauthenticated { .. } => "the credentials are not accepted".into(),
        error => error.to_string(),
    }
}

/// Replaces what the environment holds for stores, unless it is public, by asterisks.
fn redact(message: String) -> String {
    let secret = |(name, value): &(String, String)| {
        value.len() > 3
            && SETTINGS.iter().any(|prefix| name.starts_with(prefix))
            && !PUBLIC.iter().any(|part| name.contains(part))
    };
    let secrets = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    secrets.filter(secret).fold(message, |message, (_, value)| message.replace(&value, "***"))
}
