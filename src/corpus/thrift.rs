//! Walking Thrift's compact protocol without believing it: nothing is allocated for what a size claims.
//!
//! The parquet crate reserves memory for what footers and page headers announce. They are walked here
//! first, so that what they announce is known to be there, or refused.

/// Nesting beyond any parquet structure.
const DEEPEST: usize = 32;

/// Why a walk ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The bytes end before the structure does.
    Short,
    /// No structure looks like this.
    Malformed,
}

/// What the type of a field says about its bytes.
pub(super) const INTEGER: u8 = 5;
pub(super) const LIST: u8 = 9;
pub(super) const STRUCT: u8 = 12;

/// A walk along some bytes.
pub(super) struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Walk<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes that have been walked over.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn byte(&mut self) -> Result<u8, Stop> {
        let byte = *self.bytes.get(self.at).ok_or(Stop::Short)?;
        self.at += 1;
        Ok(byte)
    }

    pub(super) fn advance(&mut self, count: u64) -> Result<(), Stop> {
        let left = self.bytes.len() - self.at;
        let count = usize::try_from(count).ok().filter(|count| *count <= left).ok_or(Stop::Short)?;
        self.at += count;
        Ok(())
    }

    /// An unsigned integer of seven bits a byte.
    pub(super) fn unsigned(&mut self) -> Result<u64, Stop> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Stop::Malformed)
    }

    /// A signed integer in zigzag order.
    pub(super) fn signed(&mut self) -> Result<i64, Stop> {
        let value = self.unsigned()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// The fields of a structure. `visit` is given number and type of each and says whether it has
    /// walked over the value itself.
    pub(super) fn fields(
        &mut self,
        visit: &mut dyn FnMut(&mut Self, i64, u8) -> Result<bool, Stop>,
    ) -> Result<(), Stop> {
        self.fields_at(0, visit)
    }

    fn fields_at(
        &mut self,
        depth: usize,
        visit: &mut dyn FnMut(&mut Self, i64, u8) -> Result<bool, Stop>,
    ) -> Result<(), Stop> {
        let mut number = 0_i64;
        loop {
            let head = self.byte()?;
            let (step, kind) = (head >> 4, head & 0x0f);
            if kind == 0 {
                return Ok(());
            }
            number = if step == 0 { self.signed()? } else { number.saturating_add(i64::from(step)) };
            if !visit(self, number, kind)? {
                self.skip(kind, depth)?;
            }
        }
    }

    /// Number and type of the elements of a list that starts here.
    pub(super) fn list(&mut self) -> Result<(u64, u8), Stop> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.unsigned()? } else { u64::from(head >> 4) };
        Ok((count, head & 0x0f))
    }

    /// Walks over a value.
    fn skip(&mut self, kind: u8, depth: usize) -> Result<(), Stop> {
        if depth > DEEPEST {
            return Err(Stop::Malformed);
        }
        match kind {
            1 | 2 => Ok(()),
            3 => self.advance(1),
            4..=6 => self.unsigned().map(drop),
            7 => self.advance(8),
            8 => self.unsigned().and_then(|length| self.advance(length)),
            9 | 10 => {
                let (count, kind) = self.list()?;
                (0..count).try_for_each(|_| self.skip_element(kind, depth + 1))
            }
            11 => self.skip_map(depth),
            12 => self.fields_at(depth + 1, &mut |_, _, _| Ok(false)),
            13 => self.advance(16),
            _ => Err(Stop::Malformed),
        }
    }

    /// Truth values have a byte of their own in a list, but not as a field.
    fn skip_element(&mut self, kind: u8, depth: usize) -> Result<(), Stop> {
        if matches!(kind, 1 | 2) { self.advance(1) } else { self.skip(kind, depth) }
    }

    fn skip_map(&mut self, depth: usize) -> Result<(), Stop> {
        let count = self.unsigned()?;
        let kinds = if count == 0 { 0 } else { self.byte()? };
        (0..count).try_for_each(|_| {
            self.skip_element(kinds >> 4, depth + 1)?;
            self.skip_element(kinds & 0x0f, depth + 1)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_that_are_not_there_end_the_walk() {
        let walk = |bytes: &[u8]| Walk::new(bytes).fields(&mut |_, _, _| Ok(false));
        assert_eq!(walk(&[0]), Ok(()));
        // A list of 2^31 integers, a string of 2^35 bytes, an integer without end.
        assert_eq!(walk(&[0x19, 0xf5, 0xff, 0xff, 0xff, 0xff, 0x07, 1, 1]), Err(Stop::Short));
        assert_eq!(walk(&[0x18, 0xff, 0xff, 0xff, 0xff, 0x7f, 1]), Err(Stop::Short));
        assert_eq!(
            walk(&[0x15, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]),
            Err(Stop::Malformed)
        );
        assert_eq!(walk(&[0x1c; 4096]), Err(Stop::Malformed), "nesting is bounded");
        assert_eq!(walk(&[0x1b, 1, 0x11, 1, 2, 0]), Ok(()), "a map of truth values");
    }

    #[test]
    fn integers_are_read_in_zigzag_order() {
        for (bytes, value) in
            [(&[0_u8][..], 0), (&[1], -1), (&[2], 1), (&[0xfe, 0xff, 0xff, 0xff, 0x0f], i64::from(i32::MAX))]
        {
            assert_eq!(Walk::new(bytes).signed(), Ok(value));
        }
    }
}
