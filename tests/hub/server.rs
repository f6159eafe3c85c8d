//! A Hub on this machine: a server that lists and redirects as huggingface.co does, a second one for
//! the files that it redirects to, and faults on demand.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

pub(crate) const TOKEN: &str = "hf_secretsecretsecret";
pub(crate) const SIGNATURE: &str = "X-Signature=alsosecret";

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// `hub` or `cdn`.
    pub(crate) server: &'static str,
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// First byte of the range that is asked for.
    fn first(&self) -> usize {
        let range = self.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        range.map_or(0, |first| first.parse().unwrap())
    }
}

/// What goes wrong, once.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// This status and these headers, and no content.
    Status(u16, &'static [(&'static str, &'static str)]),
    /// The connection ends after so many bytes.
    Cut(usize),
    /// Another content.
    Content(Vec<u8>),
    /// The whole file, whatever part was asked for.
    Whole,
}

#[derive(Clone, Debug)]
pub(crate) struct RemoteFile {
    pub(crate) content: Vec<u8>,
    /// Stored apart: known by its SHA-256, served by the second server.
    pub(crate) large: bool,
}

impl RemoteFile {
    /// Name of its blob in a cache.
    pub(crate) fn hash(&self) -> String {
        if self.large { hex(&Sha256::digest(&self.content)) } else { git_hash(&self.content) }
    }

    fn sibling(&self, name: &str) -> Value {
        let mut sibling =
            json!({ "rfilename": name, "size": self.content.len(), "blobId": git_hash(&self.content) });
        if self.large {
            sibling["lfs"] = json!({ "sha256": self.hash(), "size": self.content.len(), "pointerSize": 134 });
        }
        sibling
    }
}

/// What git calls a file of this content.
pub(crate) fn git_hash(content: &[u8]) -> String {
    hex(&Sha1::new().chain_update(format!("blob {}\0", content.len())).chain_update(content).finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// A commit's files, by name.
pub(crate) type Files = BTreeMap<String, RemoteFile>;

#[derive(Default)]
struct State {
    /// Commits of `models/o/n` and `datasets/o/n` by revision.
    revisions: BTreeMap<(String, String), String>,
    commits: BTreeMap<(String, String), Files>,
    requests: Vec<Request>,
    /// Which requests fail, by a part of their path.
    faults: Vec<(&'static str, Fault)>,
    cdn: String,
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    content: Vec<u8>,
    cut: Option<usize>,
}

impl Reply {
    fn new(status: u16, content: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), content: content.into(), cut: None }
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }
}

impl State {
    fn answer(&mut self, request: &Request) -> Reply {
        self.requests.push(request.clone());
        let fault = self.faults.iter().position(|(part, _)| request.path.contains(part));
        let fault = fault.map(|at| self.faults.remove(at).1);
        if let Some(Fault::Status(status, headers)) = &fault {
            return headers
                .iter()
                .fold(Reply::new(*status, "no"), |reply, (name, value)| reply.with(name, *value));
        }
        let reply = match request.server {
            "cdn" => self.content(request, fault.as_ref()),
            _ if request.path.starts_with("/api/") => self.listing(&request.path),
            _ => self.file(request, fault.as_ref()),
        };
        reply.unwrap_or_else(|| Reply::new(404, "no").with("X-Error-Code", "RepoNotFound"))
    }

    /// `/api/models/o/n/revision/main?blobs=true`
    fn listing(&self, path: &str) -> Option<Reply> {
        let (path, query) = path.strip_prefix("/api/")?.split_once('?')?;
        assert_eq!(query, "blobs=true");
        let (repository, revision) = path.split_once("/revision/")?;
        let revision = revision.replace("%2F", "/");
        let key = |revision: &str| (repository.to_owned(), revision.to_owned());
        let commit = self.revisions.get(&key(&revision)).unwrap_or(&revision);
        let Some(files) = self.commits.get(&key(commit)) else {
            let known = self.commits.keys().any(|(known, _)| known == repository);
            return known.then(|| Reply::new(404, "no").with("X-Error-Code", "RevisionNotFound"));
        };
        let siblings: Vec<Value> = files.iter().map(|(name, file)| file.sibling(name)).collect();
        Some(Reply::new(200, json!({ "id": repository, "sha": commit, "siblings": siblings }).to_string()))
    }

    /// `/o/n/resolve/COMMIT/NAME`, for datasets below `/datasets`.
    fn file(&self, request: &Request, fault: Option<&Fault>) -> Option<Reply> {
        let (repository, rest) = request.path.strip_prefix('/')?.split_once("/resolve/")?;
        let (commit, name) = rest.split_once('/')?;
        let repository = if repository.starts_with("datasets/") {
            repository.into()
        } else {
            format!("models/{repository}")
        };
        let file = self.commits.get(&(repository, commit.to_owned()))?.get(name)?;
        if file.large {
            let place = format!("{}/{}?{SIGNATURE}", self.cdn, file.hash());
            return Some(Reply::new(302, "").with("Location", place).with("X-Linked-Etag", file.hash()));
        }
        Some(serve(request, &file.content, fault))
    }

    /// A large file of any repository by its hash.
    fn content(&self, request: &Request, fault: Option<&Fault>) -> Option<Reply> {
        let hash = request.path.strip_prefix('/')?.strip_suffix(SIGNATURE)?.strip_suffix('?')?;
        let file = self.commits.values().flat_map(BTreeMap::values).find(|file| file.hash() == hash)?;
        Some(serve(request, &file.content, fault))
    }
}

/// A content from the byte that was asked for.
fn serve(request: &Request, content: &[u8], fault: Option<&Fault>) -> Reply {
    let first = if matches!(fault, Some(Fault::Whole)) { 0 } else { request.first() };
    let content = if let Some(Fault::Content(other)) = fault { other } else { content };
    let mut reply = Reply::new(if first > 0 { 206 } else { 200 }, &content[first.min(content.len())..]);
    if first > 0 {
        let range = format!("bytes {first}-{}/{}", content.len() - 1, content.len());
        reply = reply.with("Content-Range", range);
    }
    reply.cut = if let Some(Fault::Cut(bytes)) = fault { Some(*bytes) } else { None };
    reply
}

/// The two servers.
pub(crate) struct FakeHub {
    state: Arc<Mutex<State>>,
    hub: Server,
    cdn: Server,
}

impl FakeHub {
    pub(crate) fn new() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let (hub, cdn) = (Server::new("hub", state.clone()), Server::new("cdn", state.clone()));
        state.lock().unwrap().cdn = format!("http://{}", cdn.address);
        Self { state, hub, cdn }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.hub.address)
    }

    /// Makes a revision of `models/o/n` or `datasets/o/n`; returns its commit.
    pub(crate) fn publish(&self, repository: &str, revision: &str, files: Files) -> String {
        let names: Vec<String> = files.iter().map(|(name, file)| name.clone() + &file.hash()).collect();
        let commit = git_hash(names.concat().as_bytes());
        let mut state = self.state.lock().unwrap();
        state.revisions.insert((repository.into(), revision.into()), commit.clone());
        state.commits.insert((repository.into(), commit.clone()), files);
        commit
    }

    /// Lets the next request whose path has this part go wrong.
    pub(crate) fn fail(&self, part: &'static str, fault: Fault) {
        self.state.lock().unwrap().faults.push((part, fault));
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

struct Server {
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn new(name: &'static str, state: Arc<Mutex<State>>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, state) = (stream.unwrap(), state.clone());
                // A connection without a request ends the server.
                let Some(request) = read_request(name, &stream) else { return };
                std::thread::spawn(move || {
                    let reply = state.lock().unwrap().answer(&request);
                    write_reply(stream, &reply);
                });
            }
        });
        Self { address, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(TcpStream::connect(self.address));
        self.thread.take().unwrap().join().unwrap();
    }
}

fn read_request(server: &'static str, stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let path = lines.next()?.strip_prefix("GET ")?.split(' ').next()?.to_owned();
    let header = |line: String| {
        let (name, value) = line.split_once(':').unwrap();
        (name.to_lowercase(), value.trim().to_owned())
    };
    Some(Request { server, path, headers: lines.map(header).collect() })
}

/// Says the whole length, whatever of it is sent. The client may be gone, which is its right.
fn write_reply(mut stream: TcpStream, reply: &Reply) {
    let mut head = format!("HTTP/1.1 {} x\r\nContent-Length: {}\r\n", reply.status, reply.content.len());
    for (name, value) in &reply.headers {
        head.extend([name, ": ", value, "\r\n"]);
    }
    let sent = &reply.content[..reply.cut.unwrap_or(reply.content.len())];
    let _ = stream.write_all((head + "Connection: close\r\n\r\n").as_bytes());
    let _ = stream.write_all(sent);
}
