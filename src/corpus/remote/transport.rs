//! Requests of object stores, sent with patience: what may pass is tried again, with pauses that double,
//! until a deadline. An answer is complete or it is none.
//!
//! No message of this file repeats a header, a query or more of an answer than its error code.

use async_trait::async_trait;
use bytes::Bytes;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
    HttpService,
};
use std::fmt;
use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use ureq::http::request::Parts;
use ureq::http::{Method, Request, Response, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

/// Seconds without a byte after which a connection is dead; other limits are multiples of it.
const PATIENCE: &str = "RPT_REMOTE_TIMEOUT";
const PATIENCE_SECONDS: u64 = 30;
/// One attempt may take so many times the patience, and all attempts together so many times.
const ATTEMPT: u32 = 4;
const DEADLINE: u32 = 10;
const ATTEMPTS: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// Answers are blocks of files and lists of at most a thousand names.
const LONGEST_ANSWER: u64 = 64 << 20;
const MAX_REDIRECTS: u32 = 8;

/// Why a request had no answer that is of use.
#[derive(Clone, Debug)]
pub(super) struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

/// How an attempt ended without an answer.
enum Ended {
    /// Another attempt may succeed, after so many seconds if the server names them.
    Passing(String, Option<u64>),
    Final(String),
}

/// Sends requests.
#[derive(Clone, Debug)]
pub(super) struct Transport {
    agent: Agent,
    patience: Duration,
    /// Whether plain HTTP may leave this machine.
    plain: bool,
}

impl Transport {
    /// Requests to a `web` server carry no credentials and follow redirects.
    pub(super) fn new(web: bool) -> Result<Self, Failure> {
        let seconds =
            std::env::var(PATIENCE).ok().and_then(|text| text.parse().ok()).filter(|seconds| *seconds > 0);
        let patience = Duration::from_secs(seconds.unwrap_or(PATIENCE_SECONDS).min(3600));
        let roots = std::env::var_os("SSL_CERT_FILE")
            .map_or(Ok(RootCerts::WebPki), |path| authorities(&fs::read(path).unwrap_or_default()))?;
        let agent = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .user_agent(concat!("rpt/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(if web { MAX_REDIRECTS } else { 0 })
            .max_redirects_will_error(false)
            .timeout_per_call(Some(patience * ATTEMPT))
            .timeout_connect(Some(patience.min(Duration::from_secs(15))))
            .timeout_recv_response(Some(patience))
            .timeout_per_read(Some(patience))
            .build()
            .new_agent();
        let plain = std::env::var("AWS_ALLOW_HTTP").is_ok_and(|text| text.eq_ignore_ascii_case("true"));
        Ok(Self { agent, patience, plain })
    }

    /// Sends a request until it is answered.
    fn send(&self, parts: &Parts, body: &[u8]) -> Result<HttpResponse, Failure> {
        let place = shown(&parts.uri);
        if !self.is_allowed(&parts.uri) {
            return Err(Failure(format!("{place} is not encrypted (AWS_ALLOW_HTTP=true allows that)")));
        }
        let deadline = Instant::now() + self.patience * DEADLINE;
        // The services that give a machine its credentials are there at once or not at all.
        let attempts = if is_metadata(&parts.uri) { 1 } else { ATTEMPTS };
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let (message, asked) = match self.attempt(parts, body) {
                Ok(response) => return Ok(response),
                Err(Ended::Final(message)) => return Err(Failure(format!("{place} {message}"))),
                Err(Ended::Passing(message, asked)) => (message, asked),
            };
            let wait = asked.map_or(pause, Duration::from_secs);
            if attempt >= attempts || Instant::now() + wait >= deadline {
                return Err(Failure(format!("{place} {message} (attempts: {attempt})")));
            }
            thread::sleep(wait);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Err(Failure(format!("{place} gave no answer")))
    }

    fn attempt(&self, parts: &Parts, body: &[u8]) -> Result<HttpResponse, Ended> {
        let mut request = Request::new(body);
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = parts.uri.clone();
        *request.headers_mut() = parts.headers.clone();
        let config = self.agent.configure_request(request);
        let quick = is_metadata(&parts.uri).then_some(Duration::from_secs(2));
        let request = if quick.is_some() { config.timeout_per_call(quick).build() } else { config.build() };
        let response = self.agent.run(request).map_err(|error| ended(&error))?;
        let status = response.status().as_u16();
        match status {
            408 | 425 | 429 | 500 | 502..=504 => {
                let asked = header(&response, "retry-after").and_then(|seconds| seconds.trim().parse().ok());
                let code = error_code(response);
                Err(Ended::Passing(format!("answered {status}{code}"), asked))
            }
            404 if !is_listing(&parts.uri) => Ok(answer(response, Bytes::new())),
            200..=299 => complete(response, parts),
            301 | 307 | 308 => {
                Err(Ended::Final(format!("answered {status}: the region or the endpoint is another")))
            }
            _ => {
                let code = error_code(response);
                Err(Ended::Final(format!("answered {status}{code}")))
            }
        }
    }

    /// Plain HTTP shows everything on its way: it stays on this machine unless the user allows more.
    fn is_allowed(&self, uri: &Uri) -> bool {
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let loopback = host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        uri.scheme_str() == Some("https") || loopback || is_metadata(uri) || self.plain
    }
}

#[async_trait]
impl HttpService for Transport {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let body = body.as_bytes().cloned().unwrap_or_default();
        self.send(&parts, &body).map_err(|failure| HttpError::new(HttpErrorKind::Unknown, failure))
    }
}

impl HttpConnector for Transport {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

/// The whole body, or it counts as none: connections end early, and so do answers to ranges.
fn complete(response: Response<Body>, parts: &Parts) -> Result<HttpResponse, Ended> {
    if parts.method == Method::HEAD {
        return Ok(answer(response, Bytes::new()));
    }
    let range = parts.headers.get("range").and_then(|range| range.to_str().ok());
    let wanted = range.and_then(|range| length(range.strip_prefix("bytes=")?));
    if wanted.is_some() && response.status().as_u16() == 200 {
        return Err(Ended::Final("does not serve parts of files".into()));
    }
    let (head, body) = response.into_parts();
    let body = body.into_with_config().limit(LONGEST_ANSWER).read_to_vec().map_err(|error| ended(&error))?;
    if wanted.is_some_and(|wanted| body.len() as u64 != wanted) {
        // A range that reaches beyond the end of the file is cut short for a reason.
        let told = head.headers.get("content-range").and_then(|range| range.to_str().ok());
        let told = told.and_then(|range| length(range.strip_prefix("bytes ")?.split('/').next()?));
        if told != Some(body.len() as u64) || told != wanted {
            return Err(Ended::Passing(format!("sent {} bytes of a longer range", body.len()), None));
        }
    }
    Ok(answer(Response::from_parts(head, ()), body.into()))
}

/// Bytes of a range such as `5-9`.
fn length(range: &str) -> Option<u64> {
    let (first, last) = range.split_once('-')?;
    last.parse::<u64>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1)
}

fn answer<T>(response: Response<T>, body: Bytes) -> HttpResponse {
    response.map(|_| HttpRequestBody::from(body)).map(object_store::client::HttpResponseBody::new)
}

fn ended(error: &ureq::Error) -> Ended {
    match error {
        // Its text repeats the address.
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => Ended::Final("cannot be asked".into()),
        // rustls says so when the other side does not prove who it is.
        ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            Ended::Final(format!("is not trusted: {error} (SSL_CERT_FILE names other authorities)"))
        }
        ureq::Error::BodyExceedsLimit(_) => Ended::Final("sent more than an answer can hold".into()),
        error => Ended::Passing(format!("failed: {error}"), None),
    }
}

/// The code of an error in XML, which is all that is kept of it: what is around it may repeat secrets.
fn error_code(response: Response<Body>) -> String {
    const LONGEST: u64 = 64 * 1024;
    let body = response.into_body().into_with_config().limit(LONGEST).read_to_vec().unwrap_or_default();
    let text = String::from_utf8_lossy(&body);
    let code =
        text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>")).map(|(code, _)| code);
    let plain = |code: &&str| code.len() <= 64 && code.bytes().all(|byte| byte.is_ascii_alphabetic());
    code.filter(plain).map(|code| format!(": {code}")).unwrap_or_default()
}

fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

/// An address without its query.
fn shown(uri: &Uri) -> String {
    let host = uri.authority().map(ureq::http::uri::Authority::as_str).unwrap_or_default();
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{}://{host}{}", uri.scheme_str().unwrap_or_default(), uri.path())
}

/// Whether a bucket is listed, which is missing itself when there is no answer.
fn is_listing(uri: &Uri) -> bool {
    uri.query().is_some_and(|query| query.contains("list-type=") || query.contains("comp=list"))
}

/// Whether this is the service of a cloud that tells its machines their credentials.
fn is_metadata(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default();
    host == "metadata.google.internal"
        || host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_link_local())
}

/// The authorities of a PEM file.
fn authorities(text: &[u8]) -> Result<RootCerts, Failure> {
    let certificate = |item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    };
    let certificates: Vec<_> = parse_pem(text).filter_map(certificate).collect();
    if certificates.is_empty() {
        return Err(Failure("SSL_CERT_FILE names a file without a certificate".into()));
    }
    Ok(RootCerts::Specific(Arc::new(certificates)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_stays_on_this_machine() {
        let transport = |plain| Transport { plain, ..Transport::new(false).unwrap() };
        let allowed = |plain, uri: &'static str| transport(plain).is_allowed(&Uri::from_static(uri));
        for uri in ["https://host/a", "http://127.0.0.1:1/a", "http://localhost/a", "http://[::1]:9/a"] {
            assert!(allowed(false, uri), "{uri}");
        }
        for uri in ["http://host/a", "http://10.0.0.1/a", "http://127.0.0.1.host/a"] {
            assert!(!allowed(false, uri) && allowed(true, uri), "{uri}");
        }
    }

    #[test]
    fn addresses_are_shown_without_queries() {
        assert_eq!(shown(&Uri::from_static("https://host:1/a/b?sig=secret")), "https://host:1/a/b");
    }
}
