//! How deep a Parquet file's schema nests, told before its reader recurses into it.
//!
//! The footer is one struct in Thrift's compact protocol. Its field 2 lists the schema's elements in the order of a walk through the tree;
//! an element's field 5 counts its children.

use std::io::{self, Read, Seek, SeekFrom};

const SCHEMA: i64 = 2;
const NUM_CHILDREN: i64 = 5;
/// Structs within structs that are walked over in one element; Parquet's own have three.
const MOST_STRUCTS: usize = 16;
/// The footer's length and `PAR1`.
const TAIL: u64 = 8;

/// The deepest level of any element, the root being level 0; of a damaged footer what stands before the damage.
///
/// # Errors
/// The file cannot be read.
pub(super) fn nesting(file: &mut (impl Read + Seek)) -> io::Result<usize> {
    let end = file.seek(SeekFrom::End(0))?;
    let Some(before_tail) = end.checked_sub(TAIL) else { return Ok(0) };
    file.seek(SeekFrom::Start(before_tail))?;
    let mut length = [0; 4];
    file.read_exact(&mut length)?;
    let Some(start) = before_tail.checked_sub(u32::from_le_bytes(length).into()) else { return Ok(0) };
    file.seek(SeekFrom::Start(start))?;
    let mut footer = Vec::new();
    file.take(before_tail - start).read_to_end(&mut footer)?;
    let mut walk = Walk { left: &footer, deepest: 0 };
    // Where it ends does not matter: the reader itself says what is wrong.
    let _ = walk.footer();
    Ok(walk.deepest)
}

/// What is left of the footer. Its functions give nothing where it ends too early or is no such footer.
struct Walk<'a> {
    left: &'a [u8],
    deepest: usize,
}

impl Walk<'_> {
    fn footer(&mut self) -> Option<()> {
        let mut id = 0;
        while let Some(kind) = self.field(&mut id)? {
            match (id, kind) {
                (SCHEMA, 9) => self.schema()?,
                _ => self.skip(kind, 0)?,
            }
        }
        Some(())
    }

    fn schema(&mut self) -> Option<()> {
        let (count, _) = self.list()?;
        // How many children are still to come of each group that is not complete.
        let mut open: Vec<i64> = Vec::new();
        for _ in 0..count {
            while open.pop_if(|to_come| *to_come <= 0).is_some() {}
            if let Some(to_come) = open.last_mut() {
                *to_come -= 1;
            }
            self.deepest = self.deepest.max(open.len());
            let (mut id, mut children) = (0, 0);
            while let Some(kind) = self.field(&mut id)? {
                match (id, kind) {
                    (NUM_CHILDREN, 4..=6) => children = self.integer()?,
                    _ => self.skip(kind, 0)?,
                }
            }
            if children > 0 {
                open.push(children);
            }
        }
        Some(())
    }

    /// The kind of the next field, the id of which follows on the one before; nothing inside at the struct's end.
    fn field(&mut self, id: &mut i64) -> Option<Option<u8>> {
        let header = self.byte()?;
        if header == 0 {
            return Some(None);
        }
        *id = match header >> 4 {
            0 => self.integer()?,
            further => id.checked_add(further.into())?,
        };
        Some(Some(header & 15))
    }

    /// A list's length and the kind of its elements.
    fn list(&mut self) -> Option<(u64, u8)> {
        let header = self.byte()?;
        let count = if header >> 4 == 15 { self.varint()? } else { (header >> 4).into() };
        Some((count, header & 15))
    }

    fn skip(&mut self, kind: u8, structs: usize) -> Option<()> {
        if structs > MOST_STRUCTS {
            return None;
        }
        match kind {
            // A field's kind is its truth.
            1 | 2 => Some(()),
            3 => self.bytes(1),
            4..=6 => self.varint().map(|_| ()),
            7 => self.bytes(8),
            8 => {
                let length = self.varint()?;
                self.bytes(length)
            }
            9 | 10 => {
                let (count, kind) = self.list()?;
                (0..count).try_for_each(|_| self.element(kind, structs))
            }
            11 => {
                let count = self.varint()?;
                let kinds = if count == 0 { 0 } else { self.byte()? };
                (0..count).try_for_each(|_| {
                    self.element(kinds >> 4, structs)?;
                    self.element(kinds & 15, structs)
                })
            }
            12 => {
                let mut id = 0;
                while let Some(kind) = self.field(&mut id)? {
                    self.skip(kind, structs + 1)?;
                }
                Some(())
            }
            _ => None,
        }
    }

    /// Skips what stands in a list, where truth takes a byte.
    fn element(&mut self, kind: u8, structs: usize) -> Option<()> {
        if matches!(kind, 1 | 2) { self.bytes(1) } else { self.skip(kind, structs + 1) }
    }

    fn byte(&mut self) -> Option<u8> {
        let (first, left) = self.left.split_first()?;
        self.left = left;
        Some(*first)
    }

    fn bytes(&mut self, count: u64) -> Option<()> {
        self.left = self.left.get(usize::try_from(count).ok()?..)?;
        Some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Some(value);
            }
        }
        None
    }

    /// A zigzag integer.
    fn integer(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    /// A file of a footer alone.
    fn file(footer: &[u8]) -> Vec<u8> {
        [footer, &(footer.len() as u32).to_le_bytes(), b"PAR1"].concat()
    }

    /// A chain of groups, each with one child.
    fn chain(levels: usize) -> Vec<u8> {
        let mut footer = vec![0x15, 0x02, 0x19, 0xFC];
        let mut count = levels + 1;
        while count > 127 {
            footer.push(count as u8 | 128);
            count >>= 7;
        }
        footer.push(count as u8);
        for level in 0..=levels {
            // A name of one letter; in all but the last one child; the end.
            footer.extend([0x48, 0x01, b'a']);
            footer.extend(if level < levels { vec![0x15, 0x02] } else { vec![] });
            footer.push(0);
        }
        footer.push(0);
        file(&footer)
    }

    #[test]
    fn a_chain_is_as_deep_as_it_is_long() {
        for levels in [0, 1, 5, 200_000] {
            assert_eq!(nesting(&mut Cursor::new(chain(levels))).unwrap(), levels);
        }
        // What stands before the cut.
        let cut = chain(100)[..200].to_vec();
        assert!((30..100).contains(&nesting(&mut Cursor::new(file(&cut))).unwrap()));
    }

    #[test]
    fn a_file_of_the_crate_itself() {
        use ::parquet::file::writer::SerializedFileWriter;
        let schema = "message m { optional group a (LIST) { repeated group list { optional binary element (UTF8); } }
            required int64 b; required group c { required group d { required double e; } required int96 f; } required boolean g; }";
        let schema = ::parquet::schema::parser::parse_message_type(schema).unwrap().into();
        let writer = SerializedFileWriter::new(Vec::new(), schema, Default::default()).unwrap();
        assert_eq!(nesting(&mut Cursor::new(writer.into_inner().unwrap())).unwrap(), 3);
    }

    proptest! {
        #[test]
        fn any_bytes_are_walked_over(footer in proptest::collection::vec(any::<u8>(), 0..300), claimed in any::<u32>()) {
            nesting(&mut Cursor::new(file(&footer))).unwrap();
            let lying = [&footer[..], &claimed.to_le_bytes(), b"PAR1"].concat();
            nesting(&mut Cursor::new(lying)).unwrap();
            nesting(&mut Cursor::new(footer)).unwrap();
        }
    }
}
