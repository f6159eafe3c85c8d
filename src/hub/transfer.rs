//! One content from the Hub into the cache, over as many connections as it takes.

use super::HubError;
use super::cache::RepositoryCache;
use super::client::{Client, Failure, header};
use super::listing::Entry;
use super::store::{check_content, create_parent, remove};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use ureq::Body;
use ureq::http::Response;

const CHUNK_BYTES: usize = 1 << 17;
/// So much in one attempt shows that the network works: the next failure is a first one again.
const PROGRESS_BYTES: u64 = 1 << 20;
/// Larger files say how far they are, at every tenth.
const LARGE_BYTES: u64 = 256 << 20;

/// A content that is being downloaded, while its lock is held.
pub(super) struct Transfer<'a> {
    client: &'a Client<'a>,
    /// Path of the file at the endpoint.
    path: String,
    name: &'a str,
    entry: &'a Entry,
    part: PathBuf,
}

impl<'a> Transfer<'a> {
    pub(super) fn new(
        client: &'a Client<'a>,
        cache: &RepositoryCache,
        commit: &str,
        name: &'a str,
        entry: &'a Entry,
    ) -> Self {
        let path = client.file_path(commit, name);
        Self { client, path, name, entry, part: cache.part(entry.hash()) }
    }

    /// Fetches what is missing and proves the whole; returns where it is.
    ///
    /// What an earlier call left may be damaged by a crash: if the whole does not prove right then, it is
    /// fetched once more from its beginning.
    pub(super) fn run(&self) -> Result<&PathBuf, HubError> {
        create_parent(&self.part)?;
        let mut inherited = self.kept()?;
        if inherited > 0 {
            (self.client.hub.say)(&format!(
                "{}: going on at byte {inherited} of {}",
                self.name, self.entry.size
            ));
        }
        loop {
            self.fetch()?;
            let Err(found) = check_content(&self.part, self.entry, self.client)? else {
                return Ok(&self.part);
            };
            remove(&self.part)?;
            let error = self.mismatch("hash", found, self.entry.hash().name());
            if inherited == 0 {
                return Err(error);
            }
            (self.client.hub.say)(&format!("{error}; starting over"));
            inherited = 0;
        }
    }

    /// Bytes of the part that is there; one that is too long is no part of this content.
    fn kept(&self) -> Result<u64, HubError> {
        match fs::metadata(&self.part).map(|metadata| metadata.len()) {
            Ok(length) if length <= self.entry.size => Ok(length),
            Ok(_) => remove(&self.part).map(|()| 0),
            Err(_) => Ok(0),
        }
    }

    /// Attempts until the part has the listed size.
    fn fetch(&self) -> Result<(), HubError> {
        let mut patience = self.client.patience();
        loop {
            let start = self.kept()?;
            let Err(failure) = self.attempt(start) else { return Ok(()) };
            if self.kept()? >= start + PROGRESS_BYTES {
                patience = self.client.patience();
            }
            self.client.pause(&mut patience, failure)?;
        }
    }

    fn attempt(&self, start: u64) -> Result<(), Failure> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&self.part);
        let mut file = file.map_err(HubError::io(&self.part))?;
        if start < self.entry.size || self.entry.size == 0 {
            let response = self.client.get(&self.path, start)?;
            let start = self.accept(&response, start)?;
            self.receive(&mut file, response, start)?;
        }
        Ok(file.sync_all().map_err(HubError::io(&self.part))?)
    }

    /// The byte that an answer starts at.
    fn accept(&self, response: &Response<Body>, start: u64) -> Result<u64, Failure> {
        let number = |name, text: &str| {
            let parsed: Option<u64> = text.trim().parse().ok();
            parsed.filter(|size| *size == self.entry.size).ok_or_else(|| self.refuse(name, text))
        };
        match response.status().as_u16() {
            206 => {
                let range = header(response, "content-range").and_then(|range| range.strip_prefix("bytes "));
                let (range, total) = range.and_then(|range| range.split_once('/')).unwrap_or_default();
                if total != "*" {
                    number("size", total)?;
                }
                let first = range.split('-').next().and_then(|first| first.parse().ok());
                if first == Some(start) {
                    Ok(start)
                } else {
                    Err(self.start_over("sent another part of the file"))
                }
            }
            416 => Err(self.start_over("has no such part of the file")),
            _ => header(response, "content-length").map_or(Ok(0), |length| number("size", length).map(|_| 0)),
        }
    }

    /// Writes to fixed places: where a file system ignores locks, two processes write the same bytes.
    fn receive(&self, file: &mut File, response: Response<Body>, start: u64) -> Result<(), Failure> {
        let io = || HubError::io(&self.part);
        file.set_len(start).and_then(|()| file.seek(SeekFrom::Start(start))).map_err(io())?;
        let mut reader = response.into_body().into_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut at = start;
        loop {
            self.client.check_interrupt()?;
            let read = match reader.read(&mut chunk) {
                Ok(0) if at == self.entry.size => return Ok(()),
                Ok(0) => return Err(self.broken(at, "the connection ended")),
                Ok(read) => read,
                Err(error) => return Err(self.broken(at, &error.to_string())),
            };
            if at + read as u64 > self.entry.size {
                return Err(self.refuse("size", "larger"));
            }
            file.write_all(&chunk[..read]).map_err(io())?;
            self.say_progress(at, at + read as u64);
            at += read as u64;
        }
    }

    fn say_progress(&self, before: u64, now: u64) {
        let size = self.entry.size;
        let tenth = |at: u64| u128::from(at) * 10 / u128::from(size.max(1));
        if size >= LARGE_BYTES && tenth(before) < tenth(now) {
            (self.client.hub.say)(&format!("{}: {} % of {} MiB", self.name, tenth(now) * 10, size >> 20));
        }
    }

    fn broken(&self, at: u64, message: &str) -> Failure {
        let message = format!("{message} after {at} of {} bytes", self.entry.size);
        Failure::Passing(HubError::Unreachable { address: self.client.shown(&self.path), message }, None)
    }

    fn start_over(&self, message: &str) -> Failure {
        let answer = HubError::Answer { address: self.client.shown(&self.path), message: message.into() };
        match remove(&self.part) {
            Ok(()) => Failure::Passing(answer, None),
            Err(error) => Failure::Final(error),
        }
    }

    /// A size that is not the listed one: nothing of it is kept.
    fn refuse(&self, what: &'static str, found: &str) -> Failure {
        let error = self.mismatch(what, found.to_owned(), &self.entry.size.to_string());
        Failure::Final(remove(&self.part).err().unwrap_or(error))
    }

    fn mismatch(&self, what: &'static str, found: String, listed: &str) -> HubError {
        HubError::Mismatch { address: self.client.shown(&self.path), what, found, listed: listed.into() }
    }
}
