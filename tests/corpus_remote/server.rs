//! A bucket on this machine: lists and serves ranges as S3 does, and faults on demand.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Names in one answer to a listing.
const PAGE: usize = 3;

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: BTreeMap<String, String>,
    pub(crate) headers: BTreeMap<String, String>,
}

impl Request {
    /// The bytes that are asked for.
    pub(crate) fn range(&self) -> Option<Range<usize>> {
        let (first, last) = self.headers.get("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some(first.parse().unwrap()..last.parse::<usize>().unwrap() + 1)
    }
}

/// What goes wrong, once.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// This status, with an error that repeats everything that was sent.
    Status(u16),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// After so many bytes nothing comes any more.
    Stall(usize),
    /// The range is so many bytes shorter than asked for, and said to be.
    Short(usize),
    /// The whole file, whatever part was asked for.
    Whole,
    /// Another version of the file.
    Changed,
}

#[derive(Default)]
struct State {
    /// Contents by `bucket/key`.
    files: BTreeMap<String, Vec<u8>>,
    requests: Vec<Request>,
    /// Which requests go wrong, after how many that do not.
    faults: Vec<(String, usize, Fault)>,
}

struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    fault: Option<Fault>,
}

impl Reply {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), fault: None }
    }
}

impl State {
    fn answer(&mut self, request: &Request) -> Reply {
        self.requests.push(request.clone());
        let matches =
            |part: &String| request.path.contains(part) || request.query.values().any(|value| value == part);
        let at = self.faults.iter().position(|(part, ..)| matches(part));
        let fault = match at.map(|at| (at, self.faults[at].1)) {
            Some((at, 0)) => Some(self.faults.remove(at).2),
            Some((at, _)) => {
                self.faults[at].1 -= 1;
                None
            }
            None => None,
        };
        if let Some(Fault::Status(status)) = fault {
            let echo = format!("<Error><Code>SlowDown</Code><Message>{request:?}</Message></Error>");
            return Reply::new(status, echo);
        }
        let path = request.path.trim_start_matches('/').to_owned();
        if request.query.contains_key("list-type") {
            if path.starts_with("nobucket") {
                return Reply::new(404, "<Error><Code>NoSuchBucket</Code></Error>");
            }
            return self.listing(path.trim_end_matches('/'), &request.query);
        }
        match self.files.get(&path) {
            Some(content) => serve(request, content, fault),
            None => Reply::new(404, "<Error><Code>NoSuchKey</Code></Error>"),
        }
    }

    fn listing(&self, bucket: &str, query: &BTreeMap<String, String>) -> Reply {
        let prefix = query.get("prefix").cloned().unwrap_or_default();
        let after = query.get("continuation-token").cloned().unwrap_or_default();
        let keys = self
            .files
            .iter()
            .filter_map(|(path, content)| Some((path.strip_prefix(bucket)?.strip_prefix('/')?, content)));
        let found: Vec<_> =
            keys.filter(|(key, _)| key.starts_with(&prefix) && *key > after.as_str()).collect();
        let mut xml = String::from("<?xml version=\"1.0\"?><ListBucketResult>");
        for (key, content) in found.iter().take(PAGE) {
            let tag = tag(content);
            write!(
                xml,
                "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{tag}</ETag>\
                 <Size>{}</Size></Contents>",
                content.len()
            )
            .unwrap();
        }
        if found.len() > PAGE {
            write!(
                xml,
                "<IsTruncated>true</IsTruncated><NextContinuationToken>{}</NextContinuationToken>",
                found[PAGE - 1].0
            )
            .unwrap();
        }
        Reply::new(200, xml + "</ListBucketResult>")
    }
}

fn tag(content: &[u8]) -> String {
    format!("\"{}\"", blake3::hash(content).to_hex())
}

fn serve(request: &Request, content: &[u8], fault: Option<Fault>) -> Reply {
    let range = request.range().filter(|_| !matches!(fault, Some(Fault::Whole)));
    let mut part = range.clone().unwrap_or(0..content.len());
    part.end = part.end.min(content.len());
    if let Some(Fault::Short(bytes)) = fault {
        part.end -= bytes;
    }
    let body = if request.method == "HEAD" { Vec::new() } else { content[part.clone()].to_vec() };
    let mut reply = Reply::new(if range.is_some() { 206 } else { 200 }, body);
    let tag = if matches!(fault, Some(Fault::Changed)) { "\"another\"".into() } else { tag(content) };
    reply.headers = vec![
        ("ETag", tag),
        ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT".into()),
        ("Content-Length", part.len().to_string()),
    ];
    if range.is_some() {
        reply
            .headers
            .push(("Content-Range", format!("bytes {}-{}/{}", part.start, part.end - 1, content.len())));
    }
    reply.fault = fault;
    reply
}

/// The server.
pub(crate) struct FakeStore {
    state: Arc<Mutex<State>>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl FakeStore {
    pub(crate) fn new() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = state.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, state) = (stream.unwrap(), shared.clone());
                // A connection without a request ends the server.
                let Some(request) = read_request(&stream) else { return };
                std::thread::spawn(move || {
                    let reply = state.lock().unwrap().answer(&request);
                    // A client that lost patience has closed its side.
                    drop(write_reply(stream, &reply));
                });
            }
        });
        Self { state, address, thread: Some(thread) }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Puts a file under `bucket/key`.
    pub(crate) fn put(&self, path: &str, content: Vec<u8>) {
        self.state.lock().unwrap().files.insert(path.into(), content);
    }

    /// Lets the next request go wrong whose path has this part, or whose query this value.
    pub(crate) fn fail(&self, part: &str, fault: Fault) {
        self.state.lock().unwrap().faults.push((part.into(), 0, fault));
    }

    /// The same after so many such requests that go well.
    pub(crate) fn fail_after(&self, count: usize, part: &str, fault: Fault) {
        self.state.lock().unwrap().faults.push((part.into(), count, fault));
    }

    /// Faults that no request has met.
    pub(crate) fn faults_left(&self) -> usize {
        self.state.lock().unwrap().faults.len()
    }

    pub(crate) fn forget_faults(&self) {
        self.state.lock().unwrap().faults.clear();
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

impl Drop for FakeStore {
    fn drop(&mut self) {
        drop(TcpStream::connect(self.address));
        self.thread.take().unwrap().join().unwrap();
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let start = lines.next()?;
    let mut parts = start.split(' ');
    let (method, target) = (parts.next()?.to_owned(), parts.next()?);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        (name.to_owned(), decode(value))
    };
    let header = |line: String| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_owned()))
    };
    let query = query.split('&').filter(|part| !part.is_empty()).map(pair).collect();
    Some(Request { method, path: decode(path), query, headers: lines.filter_map(header).collect() })
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next().unwrap(), rest.next().unwrap()];
            bytes.push(u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap());
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).unwrap()
}

fn write_reply(mut stream: TcpStream, reply: &Reply) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Status\r\nConnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    if !reply.headers.iter().any(|(name, _)| *name == "Content-Length") {
        write!(head, "Content-Length: {}\r\n", reply.body.len()).unwrap();
    }
    stream.write_all((head + "\r\n").as_bytes())?;
    let most = match reply.fault {
        Some(Fault::Cut(bytes) | Fault::Stall(bytes)) => bytes,
        _ => reply.body.len(),
    };
    stream.write_all(&reply.body[..most.min(reply.body.len())])?;
    if matches!(reply.fault, Some(Fault::Stall(_))) {
        // Until the client hangs up.
        stream.read_to_end(&mut Vec::new())?;
    }
    Ok(())
}
