//! Footers of parquet files, checked before the parquet crate sees them.

use super::blob::Blob;
use super::guard::guarded;
use super::thrift::{INTEGER, LIST, STRUCT, Stop, Walk};
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

/// Footers beyond this are damage: they take about ten times as much memory.
const LONGEST: u64 = 256 << 20;
/// Read at once from the end of a file: most footers are shorter.
const TAIL: u64 = 64 * 1024;
/// Length and magic number behind the footer.
const SUFFIX: usize = 8;
/// Levels of nesting of a schema: the parquet crate recurses.
const DEEPEST: usize = 64;

/// Reads the footer of a file, or says why that is not possible.
pub(super) fn read(blob: &Blob) -> Result<ParquetMetaData, String> {
    let length = blob.length();
    let tail = blob.read(length.saturating_sub(TAIL)..length).map_err(|error| error.to_string())?;
    let suffix = tail.len().checked_sub(SUFFIX).ok_or("it is too short for a parquet file")?;
    let footer = match &tail[suffix..] {
        [a, b, c, d, b'P', b'A', b'R', b'1'] => u64::from(u32::from_le_bytes([*a, *b, *c, *d])),
        [.., b'P', b'A', b'R', b'E'] => return Err("its footer is encrypted".into()),
        _ => return Err("it does not end as a parquet file does".into()),
    };
    if footer > LONGEST.min(length - SUFFIX as u64) {
        return Err(format!("it claims a footer of {footer} bytes in a file of {length}"));
    }
    let bytes = if let Some(start) = suffix.checked_sub(footer as usize) {
        tail.slice(start..suffix)
    } else {
        let end = length - SUFFIX as u64;
        blob.read(end - footer..end).map_err(|error| error.to_string())?
    };
    check(&bytes)?;
    guarded(|| ParquetMetaDataReader::decode_metadata(&bytes))
}

/// Numbers of children decide how much the parquet crate reserves and how deep it recurses.
fn check(footer: &[u8]) -> Result<(), String> {
    let mut children = Vec::new();
    let walked = Walk::new(footer).fields(&mut |walk, number, kind| {
        let schema = number == 2 && kind == LIST;
        if schema {
            children = schema_children(walk)?;
        }
        Ok(schema)
    });
    match walked {
        Ok(()) if is_tree(&children) => Ok(()),
        Ok(()) => Err("the schema in its footer is not a tree".into()),
        Err(Stop::Short) => Err("its footer announces more than it holds".into()),
        Err(Stop::Malformed) => Err("its footer is malformed".into()),
    }
}

/// How many children each element of the schema claims.
fn schema_children(walk: &mut Walk) -> Result<Vec<i64>, Stop> {
    let (count, kind) = walk.list()?;
    if kind != STRUCT {
        return Err(Stop::Malformed);
    }
    let mut children = Vec::new();
    for _ in 0..count {
        let mut own = 0;
        walk.fields(&mut |walk, number, kind| {
            let named = number == 5 && kind == INTEGER;
            if named {
                own = walk.signed()?;
            }
            Ok(named)
        })?;
        children.push(own);
    }
    Ok(children)
}

/// Whether the elements, in depth-first order, are one tree of a depth that exists.
fn is_tree(children: &[i64]) -> bool {
    let mut open: Vec<i64> = vec![1];
    for own in children {
        while open.last() == Some(&0) {
            open.pop();
        }
        let Some(left) = open.last_mut() else { return false };
        *left -= 1;
        if *own < 0 || *own > children.len() as i64 || open.len() > DEEPEST {
            return false;
        }
        open.push(*own);
    }
    open.iter().all(|left| *left == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemas_are_trees() {
        assert!(is_tree(&[2, 0, 1, 0]));
        for bad in [&[2, 0][..], &[0, 0], &[1, -1], &[1 << 40, 0], &[], &[1; 100]] {
            assert!(!is_tree(bad), "{bad:?}");
        }
    }
}
