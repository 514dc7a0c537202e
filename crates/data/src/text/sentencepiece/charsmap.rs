//! Checks of a normaliser's table, which the tokenizers library follows without looking where it leads.

use std::collections::HashSet;

/// The library reads the table as a length, a double-array trie of that many bytes and a text of replacements. Refuses one whose trie leads out of
/// itself or to what is no place of the text.
pub(super) fn check(table: &[u8]) -> Result<(), String> {
    if table.is_empty() {
        return Ok(());
    }
    let damaged = |what: &str| format!("expected a trie and its replacements, got {what}; fetch the file again");
    let Some((length, rest)) = table.split_first_chunk() else { return Err(damaged("too few bytes")) };
    let length = u32::from_le_bytes(*length) as usize;
    if length == 0 || !length.is_multiple_of(4) || length > rest.len() {
        return Err(damaged(&format!("a trie of {length} bytes in {}", rest.len())));
    }
    let (trie, replacements) = rest.split_at(length);
    let units: Vec<u32> =
        trie.chunks_exact(4).map(|unit| u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]])).collect();
    let Ok(replacements) = std::str::from_utf8(replacements) else {
        return Err(damaged("replacements that are not UTF-8"));
    };

    let mut seen = HashSet::new();
    let mut open = vec![offset(units[0])];
    while let Some(node) = open.pop() {
        if !seen.insert(node) {
            continue;
        }
        // The next byte of a text picks one of the 255 units around.
        if node | 0xff >= units.len() {
            return Err(damaged("a branch out of the trie"));
        }
        for byte in 1..=0xff {
            let (place, unit) = (node ^ byte, units[node ^ byte]);
            if label(unit) != byte {
                continue;
            }
            let next = place ^ offset(unit);
            if has_leaf(unit) {
                let leaf = units.get(next).map(|&leaf| (leaf & !LEAF) as usize);
                if !leaf.is_some_and(|place| replacements.is_char_boundary(place)) {
                    return Err(damaged("a replacement out of the text"));
                }
            }
            open.push(next);
        }
    }
    Ok(())
}

/// Marks a unit that holds a value, which no byte leads to.
const LEAF: u32 = 1 << 31;

/// The byte that leads to a unit; more than a byte for one that holds a value.
fn label(unit: u32) -> usize {
    (unit & (LEAF | 0xff)) as usize
}

fn has_leaf(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

/// What a unit's place is combined with to find its children; a flag says whether it counts units or blocks of 256.
fn offset(unit: u32) -> usize {
    ((unit >> 10) as usize) << ((unit & 1 << 9) >> 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table whose trie has `units` at these places and nothing else.
    fn table(length: usize, units: &[(usize, u32)], replacements: &[u8]) -> Vec<u8> {
        let mut trie = vec![0u32; length];
        units.iter().for_each(|&(place, unit)| trie[place] = unit);
        let bytes = trie.iter().flat_map(|unit| unit.to_le_bytes());
        (4 * length as u32).to_le_bytes().into_iter().chain(bytes).chain(replacements.iter().copied()).collect()
    }

    /// `a` leads to a unit whose leaf, one place further, is the replacement at `place`.
    fn replaced(place: u32) -> [(usize, u32); 2] {
        let a = u32::from(b'a');
        [(0x61, 1 << 10 | 1 << 8 | a), (0x60, LEAF | place)]
    }

    #[test]
    fn tables_that_lead_somewhere_pass() {
        assert_eq!(check(b""), Ok(()));
        for place in [0, 2, 4] {
            assert_eq!(check(&table(256, &replaced(place), "x\0\u{e9}".as_bytes())), Ok(()), "{place}");
        }
    }

    #[test]
    fn tables_that_lead_astray_are_refused() {
        let refused = |table: &[u8], expected: &str| {
            let message = check(table).unwrap_err();
            assert!(message.contains(expected), "{message}");
        };
        refused(&[1, 0], "too few bytes");
        refused(&[0xff; 8], "a trie of 4294967295 bytes in 4");
        refused(&table(0, &[], b""), "a trie of 0 bytes in 0");
        refused(&table(100, &[], b""), "a branch out of the trie");
        refused(&table(256, &[(0, 256 << 10)], b""), "a branch out of the trie");
        refused(&table(256, &[(0x61, 1 << 20 | 0x61)], b""), "a branch out of the trie");
        refused(&table(256, &replaced(3), "\u{e9}\u{e9}".as_bytes()), "a replacement out of the text");
        refused(&table(256, &replaced(9), b"x"), "a replacement out of the text");
        refused(&table(256, &[], b"\xff"), "not UTF-8");
        // A loop ends.
        assert_eq!(check(&table(256, &[(0x61, 0x61 << 10 | 0x61)], b"")), Ok(()));
    }
}
