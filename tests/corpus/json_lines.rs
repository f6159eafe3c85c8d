//! JSON lines next to parquet.

use super::{config, plain, read_all, strings, texts, write};
use flate2::write::GzEncoder;
use rpt::config::CorpusConfig;
use rpt::corpus::{Corpus, CorpusError};
use std::fs;
use std::io::Write;
use std::path::Path;
use tempfile::TempDir;

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zstd(content: &[u8]) -> Vec<u8> {
    zstd::encode_all(content, 3).unwrap()
}

fn lines(name: &str, count: usize) -> String {
    let line = |index: usize| format!("{{\"n\": [1, {{}}], \"text\": \"{name} {index} \\u00e9\\n\"}}\n");
    (0..count).map(line).collect()
}

fn documents(name: &str, count: usize) -> Vec<String> {
    (0..count).map(|index| format!("{name} {index} é\n")).collect()
}

#[test]
fn lines_of_every_compression_are_read_beside_parquet() {
    let directory = TempDir::new().unwrap();
    let at = |name: &str| directory.path().join(name);
    write(&at("b.parquet"), vec![("text", strings(&["parquet"]))], plain());
    fs::write(at("a.jsonl"), lines("a", 700)).unwrap();
    let (first, second) = (lines("c", 300), lines("c2", 300));
    fs::write(at("c.jsonl.gz"), [gzip(first.as_bytes()), gzip(second.as_bytes())].concat()).unwrap();
    fs::write(at("d.ndjson.zst"), [zstd(first.as_bytes()), zstd(second.as_bytes())].concat()).unwrap();
    fs::write(at("e.json.gz"), gzip(lines("e", 1).trim_end().as_bytes())).unwrap();
    fs::write(at("info.json"), "{}").unwrap();
    fs::write(at("f.jsonl.gz"), "").unwrap();
    let both = [documents("c", 300), documents("c2", 300)].concat();
    let expected =
        [documents("a", 700), vec!["parquet".into()], both.clone(), both.clone(), documents("e", 1)];
    assert_eq!(texts(&config(directory.path())), expected.concat());
    assert_eq!(texts(&config(at("[cd].*"))), [both.clone(), both].concat());
    fs::rename(at("a.jsonl"), at("a.json")).unwrap();
    assert_eq!(texts(&config(at("a.json"))), documents("a", 700));
}

#[test]
fn lines_without_a_text_are_dropped_and_counted_by_reason() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.jsonl");
    let content = [
        &b"\xef\xbb\xbf{\"m\": {\"text\": \"first\", \"id\": \"one\"}}\r\n"[..],
        b"{\"m\": {\"text\": \"second\", \"id\": 2}, \"m.id\": 3}\n",
        b"{\"m\": {\"text\": \"third\", \"id\": [1]}}\n\n",
        b"{\"m\": {\"text\": null}}\n{\"m\": {}}\n{}\n{\"m.text\": 5}\n{\"m\": {\"text\": [\"a\"]}}\n",
        b"{\"m\": \n[]\n\"text\"\n{\"m\": {\"text\": \"\\ud800\"}}\n{\"m\": {\"text\": \"\xff\"}}\n",
        b"{\"m\": {\"text\": \"\"}}\n{\"m\": {\"text\": \"last\"}}",
    ];
    fs::write(&path, content.concat()).unwrap();
    let config =
        CorpusConfig { text_column: "m.text".into(), id_column: Some("m.id".into()), ..config(&path) };
    let (documents, counts) = read_all(&config).unwrap();
    let parts: Vec<_> =
        documents.iter().map(|document| (document.id.as_str(), document.text.as_str())).collect();
    assert_eq!(
        parts,
        [("one", "first"), ("3", "second"), ("file.jsonl:2", "third"), ("file.jsonl:15", "last")]
    );
    let expected = [
        ("bad_json", 4),
        ("blank_line", 1),
        ("no_text", 2),
        ("not_utf8", 1),
        ("null_text", 1),
        ("text_not_string", 2),
        ("too_short", 1),
    ];
    assert_eq!(counts.dropped, expected.map(|(reason, count)| (reason.to_owned(), count)).into());
    assert_eq!((counts.quarantined_total, counts.row_groups, counts.documents), (0, 1, 4));
}

#[test]
fn misnamed_keys_are_mistakes() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.jsonl");
    fs::write(&path, "{\"content\": \"a\", \"n\": 1}\n{\"content\": \"b\"}\n").unwrap();
    let fail = |text: &str, id: Option<&str>| {
        let config =
            CorpusConfig { text_column: text.into(), id_column: id.map(Into::into), ..config(&path) };
        Corpus::open(&config).unwrap_err()
    };
    let error = fail("contents", None);
    assert!(error.to_string().ends_with("no column `contents`; its columns are content, n"), "{error}");
    assert_eq!(error.hint().unwrap(), "did you mean `content`?");
    assert!(fail("n", None).to_string().ends_with("holds an integer, not text (a string)"));
    assert!(matches!(fail("content", Some("name")), CorpusError::NoColumn { .. }));
    let config = CorpusConfig { text_column: "content".into(), id_column: Some("n".into()), ..config(&path) };
    assert_eq!(read_all(&config).unwrap().0[0].id, "1");
}

#[test]
fn damaged_compression_quarantines_the_file_from_that_line_on() {
    let directory = TempDir::new().unwrap();
    let content = lines("a", 5000);
    for (name, whole) in [("a.jsonl.gz", gzip(content.as_bytes())), ("a.jsonl.zst", zstd(content.as_bytes()))]
    {
        let path = directory.path().join(name);
        fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        let corpus = Corpus::open(&config(&path)).unwrap();
        let mut stream = corpus.documents();
        let found: Vec<String> = stream.by_ref().map(|document| document.unwrap().text).collect();
        assert_eq!(found, documents("a", 5000)[..found.len()], "{name}");
        let [place] = &stream.counts().quarantined[..] else { panic!("{:?}", stream.counts()) };
        assert_eq!((place.row_group, place.rows_read), (Some(0), found.len() as u64), "{name}");
        fs::write(&path, "neither gzip nor zstd\n").unwrap();
        assert!(matches!(Corpus::open(&config(&path)), Err(CorpusError::Unreadable { .. })), "{name}");
    }
}

#[test]
fn reading_lines_restarts_at_every_document() {
    let directory = TempDir::new().unwrap();
    for (name, content) in [("a.jsonl.gz", lines("a", 400)), ("b.jsonl.gz", lines("b", 9))] {
        fs::write(directory.path().join(name), gzip(content.replace("a 7 ", "\" 7").as_bytes())).unwrap();
    }
    let corpus = Corpus::open(&config(directory.path())).unwrap();
    let all: Vec<_> = corpus.documents().map(Result::unwrap).collect();
    assert_eq!(all.len(), 399 + 9);
    let mut stream = corpus.documents();
    for (index, expected) in all.iter().enumerate() {
        let mut restarted = corpus.documents_from(stream.cursor());
        assert!(restarted.by_ref().take(3).map(Result::unwrap).eq(all[index..].iter().take(3).cloned()));
        assert_eq!(&stream.next().unwrap().unwrap(), expected);
    }
    assert!(corpus.documents_from(stream.cursor()).next().is_none());
}

#[test]
fn the_fingerprint_sees_both_ends_of_a_file_of_lines() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.jsonl");
    let fingerprint = |path: &Path, content: &str| {
        fs::write(path, content).unwrap();
        Corpus::open(&config(path)).unwrap().fingerprint().unwrap()
    };
    let content = lines("a", 10_000);
    let first = fingerprint(&path, &content);
    assert_eq!(first, fingerprint(&path, &content));
    assert_ne!(first, fingerprint(&path, &content.replacen("a 0 ", "b 0 ", 1)));
    assert_ne!(first, fingerprint(&path, &content.replacen("a 9999 ", "b 9999 ", 1)));
}
