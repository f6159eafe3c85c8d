//! Requests to the Hub: redirects, the token, passing failures, patience.

use super::listing::{Answer, Listing};
use super::reference::is_commit;
use super::{Hub, HubError, HubReference};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use ureq::http::{Response, StatusCode, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

const MAX_REDIRECTS: usize = 8;
const MAX_LISTING_BYTES: u64 = 256 << 20;
/// Longest pause that a server may ask for.
const MAX_WAIT_SECONDS: u64 = 300;
/// An upper bound on how long a pause goes on after a signal asked for a stop.
const NAP: Duration = Duration::from_millis(100);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Without a byte for so long a connection is dead.
const SILENCE: Duration = Duration::from_mins(1);

/// Why an attempt failed.
pub(super) enum Failure {
    /// Another attempt may succeed, after so many seconds if the server names them.
    Passing(HubError, Option<u64>),
    /// Another attempt would fail as well.
    Final(HubError),
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

/// Asks the Hub about one repository.
pub(super) struct Client<'a> {
    pub(super) hub: &'a Hub<'a>,
    pub(super) reference: &'a HubReference,
    agent: Agent,
}

/// What is left of the attempts at one thing.
pub(super) struct Patience {
    attempts: u32,
    pause: Duration,
    longest: Duration,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub<'a>, reference: &'a HubReference) -> Result<Self, HubError> {
        let roots = hub.settings.certificates.as_deref().map_or(Ok(RootCerts::WebPki), authorities)?;
        let agent = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .user_agent(concat!("rpt/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .http_status_as_error(false)
            // Followed here, because the token must not follow to another host.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build()
            .new_agent();
        Ok(Self { hub, reference, agent })
    }

    /// The commit of the reference's revision, and its files.
    pub(super) fn listing(&self) -> Result<(String, Listing), HubError> {
        let HubReference { kind, repository, revision, .. } = self.reference;
        let path =
            format!("/api/{}/{repository}/revision/{}?blobs=true", kind.plural(), encode(revision, ""));
        let json = self.patiently(|| {
            let body = self.get(&path, 0)?.into_body();
            body.into_with_config()
                .limit(MAX_LISTING_BYTES)
                .read_to_vec()
                .map_err(|error| self.network(&path, &error))
        })?;
        let refuse = |message: String| HubError::Answer { address: self.shown(&path), message };
        let (commit, listing) = Answer::read(&json).map_err(refuse)?;
        if is_commit(revision) && commit != *revision {
            return Err(refuse(format!("it answers with another commit, {commit}")));
        }
        Ok((commit, listing))
    }

    /// The content of a path of the endpoint from a byte on: status 200, 206 or 416.
    pub(super) fn get(&self, path: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut address = format!("{}{path}", self.hub.settings.endpoint);
        for _ in 0..=MAX_REDIRECTS {
            let response = self.request(&address, from)?;
            if !response.status().is_redirection() {
                return self.judge(response, &address);
            }
            let location = header(&response, "location").and_then(|location| follow(&address, location));
            address =
                location.ok_or_else(|| answer(&address, "redirects to no place that can be followed"))?;
        }
        Err(answer(&address, "redirects without end").into())
    }

    fn request(&self, address: &str, from: u64) -> Result<Response<Body>, Failure> {
        self.check_interrupt()?;
        let mut request = self.agent.get(address);
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        if let Some(token) = self.hub.settings.token.as_ref().filter(|_| self.is_endpoint(address)) {
            request = request.header("authorization", token.authorization());
        }
        request.call().map_err(|error| self.network(address, &error))
    }

    /// Whether an address is of the host that the token is for.
    fn is_endpoint(&self, address: &str) -> bool {
        origin(address).is_some_and(|place| Some(place) == origin(&self.hub.settings.endpoint))
    }

    fn judge(&self, response: Response<Body>, address: &str) -> Result<Response<Body>, Failure> {
        let status = response.status();
        let passing = |wait| Err(Failure::Passing(answer(address, &format!("answered {status}")), wait));
        match status.as_u16() {
            200 | 206 | 416 => Ok(response),
            408 | 500 | 502..=504 => passing(None),
            429 => passing(header(&response, "retry-after").and_then(|seconds| seconds.trim().parse().ok())),
            // The signature of an address has run out: the Hub gives another.
            401 | 403 if !self.is_endpoint(address) => passing(None),
            401 | 403 | 404 => Err(self.refusal(&response, address).into()),
            _ => Err(answer(address, &format!("answered {status}")).into()),
        }
    }

    fn refusal(&self, response: &Response<Body>, address: &str) -> HubError {
        let reference = self.reference.to_string();
        let status = response.status();
        let not_found =
            |what| HubError::NotFound { reference: reference.clone(), what, address: shown(address) };
        match header(response, "x-error-code") {
            Some("RepoNotFound") => not_found("repository"),
            Some("RevisionNotFound") => not_found("revision"),
            Some("EntryNotFound") => not_found("file"),
            _ if status == StatusCode::NOT_FOUND => not_found("repository"),
            _ => HubError::Denied {
                reference,
                status: status.as_u16(),
                token: self.hub.settings.token.is_some(),
                page: self.page(),
            },
        }
    }

    fn page(&self) -> String {
        format!("{}{}", self.hub.settings.endpoint, self.repository_path())
    }

    /// Path of the repository's page, below which its files are.
    fn repository_path(&self) -> String {
        let HubReference { kind, repository, .. } = self.reference;
        match kind {
            super::RepositoryKind::Model => format!("/{repository}"),
            super::RepositoryKind::Dataset => format!("/datasets/{repository}"),
        }
    }

    /// Path of a file of a commit.
    pub(super) fn file_path(&self, commit: &str, name: &str) -> String {
        format!("{}/resolve/{commit}/{}", self.repository_path(), encode(name, "/"))
    }

    /// A path of the endpoint as it is said.
    pub(super) fn shown(&self, path: &str) -> String {
        shown(&format!("{}{path}", self.hub.settings.endpoint))
    }

    /// What the network said while `address` was asked or read.
    fn network(&self, address: &str, error: &ureq::Error) -> Failure {
        let message = match error {
            // Its text repeats the address.
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => "the address cannot be asked".into(),
            ureq::Error::Io(error) if is_distrust(error) => {
                format!("{error} (SSL_CERT_FILE names the authorities to trust instead of Mozilla's)")
            }
            ureq::Error::Io(error) => error.to_string(),
            error => error.to_string(),
        };
        let address = if address.starts_with('/') { self.shown(address) } else { shown(address) };
        let unreachable = HubError::Unreachable { address, message };
        match error {
            ureq::Error::Io(error) if is_distrust(error) => Failure::Final(unreachable),
            ureq::Error::Io(_)
            | ureq::Error::Timeout(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed
            | ureq::Error::BodyStalled
            | ureq::Error::Protocol(_) => Failure::Passing(unreachable, None),
            _ => Failure::Final(unreachable),
        }
    }

    /// An interrupted run goes on another time.
    pub(super) fn check_interrupt(&self) -> Result<(), HubError> {
        match self.hub.interrupt {
            Some(interrupt) if interrupt.load(Ordering::Relaxed) => {
                Err(HubError::Interrupted { reference: self.reference.to_string() })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn patience(&self) -> Patience {
        let pause = self.hub.settings.pause;
        Patience { attempts: self.hub.settings.attempts.max(1), pause, longest: pause * 16 }
    }

    fn patiently<T>(&self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T, HubError> {
        let mut patience = self.patience();
        loop {
            match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => self.pause(&mut patience, failure)?,
            }
        }
    }

    /// Waits for another attempt, or gives up with the failure's error.
    pub(super) fn pause(&self, patience: &mut Patience, failure: Failure) -> Result<(), HubError> {
        let (error, asked) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing(error, asked) => (error, asked),
        };
        patience.attempts -= 1;
        if patience.attempts == 0 {
            return Err(error);
        }
        let pause = match (asked, error) {
            (Some(seconds), HubError::Answer { address, .. }) if seconds > MAX_WAIT_SECONDS => {
                return Err(HubError::Limited { address, seconds });
            }
            (asked, error) => {
                let pause = asked.map_or(patience.pause, Duration::from_secs);
                (self.hub.say)(&format!("{error}; trying again in {} s", pause.as_secs_f32()));
                pause
            }
        };
        patience.pause = (patience.pause * 2).min(patience.longest);
        self.sleep(pause)
    }

    pub(super) fn nap(&self) -> Result<(), HubError> {
        self.sleep(NAP)
    }

    fn sleep(&self, mut left: Duration) -> Result<(), HubError> {
        self.check_interrupt()?;
        while !left.is_zero() {
            let nap = left.min(NAP);
            std::thread::sleep(nap);
            left -= nap;
            self.check_interrupt()?;
        }
        Ok(())
    }
}

fn answer(address: &str, message: &str) -> HubError {
    HubError::Answer { address: shown(address), message: message.into() }
}

/// Whether a connection failed because the other side did not prove who it is: rustls says so in this way.
fn is_distrust(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::InvalidData
}

/// The authorities of a PEM file.
fn authorities(path: &Path) -> Result<RootCerts, HubError> {
    let refuse = |message: String| HubError::Settings { variable: "SSL_CERT_FILE", message };
    let unreadable = |error| refuse(format!("names {}, which cannot be read: {error}", path.display()));
    let text = fs::read(path).map_err(unreadable)?;
    let certificates: Vec<_> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(refuse(format!("names {}, which holds no certificate", path.display())));
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}

pub(super) fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

/// Scheme, host and port.
fn origin(address: &str) -> Option<(String, String, u16)> {
    let uri: Uri = address.parse().ok()?;
    let scheme = uri.scheme_str()?.to_owned();
    let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

/// Where a redirect leads, unless it gives up encryption or names a password.
fn follow(from: &str, location: &str) -> Option<String> {
    let (scheme, rest) = from.split_once("://")?;
    let (host, _) = rest.split_once('/').unwrap_or((rest, ""));
    let target = if location.contains("://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{host}{location}")
    } else {
        let directory = from.split('?').next()?.rsplit_once('/')?.0;
        format!("{directory}/{location}")
    };
    let uri: Uri = target.parse().ok()?;
    let safe = match uri.scheme_str()? {
        "https" => true,
        "http" => scheme == "http",
        _ => false,
    };
    (safe && !uri.authority()?.as_str().contains('@')).then_some(target)
}

/// An address without what follows the `?`, which may be a signature.
fn shown(address: &str) -> String {
    address.split('?').next().unwrap_or_default().to_owned()
}

/// Text as a part of an address; `keep` lists further characters that stay.
fn encode(text: &str, keep: &str) -> String {
    let plain =
        |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || keep.as_bytes().contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_are_followed_but_not_out_of_encryption() {
        let from = "https://hub.co/a/b?x=1";
        let to = |location: &str| follow(from, location);
        assert_eq!(to("https://cdn.co/y?sign=1").as_deref(), Some("https://cdn.co/y?sign=1"));
        assert_eq!(to("//cdn.co/y").as_deref(), Some("https://cdn.co/y"));
        assert_eq!(to("/y?z").as_deref(), Some("https://hub.co/y?z"));
        assert_eq!(to("y").as_deref(), Some("https://hub.co/a/y"));
        for refused in
            ["http://hub.co/y", "ftp://hub.co/y", "https://u:p@hub.co/y", "file:///etc/passwd", "https://"]
        {
            assert_eq!(to(refused), None, "{refused}");
        }
        assert!(follow("http://hub.co/a", "http://cdn.co/y").is_some());
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        assert_eq!(origin("https://Hub.co/a"), origin("https://hub.co:443/b?c"));
        for other in
            ["http://hub.co/", "https://hub.co:8443/", "https://hub.co.evil.co/", "https://evil.co/hub.co"]
        {
            assert_ne!(origin(other), origin("https://hub.co"), "{other}");
        }
    }

    #[test]
    fn addresses_are_encoded_and_shown_without_signatures() {
        assert_eq!(encode("refs/convert/parquet", ""), "refs%2Fconvert%2Fparquet");
        assert_eq!(encode("data/a b#é?.parquet", "/"), "data/a%20b%23%C3%A9%3F.parquet");
        assert_eq!(shown("https://cdn/x?Signature=secret"), "https://cdn/x");
    }
}
