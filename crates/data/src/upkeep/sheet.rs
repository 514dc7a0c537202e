//! A contact sheet: pictures in a grid, each with its caption below.

use unifont::get_glyph;

use crate::image::{Filter, RgbImage, decode, fit};
use crate::keyed::{Permutation, key};
use crate::loader::sample::guarded;
use crate::text::caption::Pick;
use crate::{DataError, Dataset};

/// Height of a line of text; glyphs are 8 or 16 pixels wide.
const LINE: usize = 16;
const MARGIN: usize = 6;
const PAPER: u8 = 255;
const INK: [u8; 3] = [30, 30, 30];
/// Sets the choice of samples apart from the numbers of the order.
const SHEET: u64 = 5;

/// A picture with what is written below it.
#[derive(Debug, Clone)]
pub struct Cell {
    /// The picture; `None` leaves the place empty, for one that cannot be read.
    pub picture: Option<RgbImage>,
    /// Its caption, wrapped to the cell's width.
    pub caption: String,
}

/// How a sheet is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Pictures a row.
    pub columns: usize,
    /// Side of the square that a picture is fitted into, in pixels.
    pub side: usize,
    /// Lines of text below a picture; none, and there is no margin either.
    pub lines: usize,
}

/// Draws the cells row by row; a caption that is too long ends in an ellipsis.
///
/// # Panics
/// When the layout has no column or no side.
pub fn contact_sheet(cells: &[Cell], layout: Layout) -> RgbImage {
    let Layout { columns, side, lines } = layout;
    let margin = if lines == 0 { 0 } else { MARGIN };
    let (cell_width, cell_height) = (side + 2 * margin, side + 2 * margin + lines * LINE);
    let columns = columns.min(cells.len()).max(1);
    let (width, height) = (columns * cell_width, cells.len().div_ceil(columns).max(1) * cell_height);
    let mut sheet = RgbImage { width, height, data: vec![PAPER; width * height * 3] };
    for (at, cell) in cells.iter().enumerate() {
        let (left, top) = (at % columns * cell_width + margin, at / columns * cell_height + margin);
        if let Some(picture) = &cell.picture {
            let fitted = fit(picture, side, Filter::Bicubic);
            paste(&mut sheet, &fitted, left + (side - fitted.width) / 2, top + (side - fitted.height) / 2);
        }
        for (line, text) in wrap(&cell.caption, side, lines).iter().enumerate() {
            write(&mut sheet, text, left, top + side + margin / 2 + line * LINE);
        }
    }
    sheet
}

fn paste(sheet: &mut RgbImage, picture: &RgbImage, left: usize, top: usize) {
    let row_bytes = picture.width * 3;
    for (row, pixels) in picture.data.chunks_exact(row_bytes).enumerate() {
        let start = ((top + row) * sheet.width + left) * 3;
        sheet.data[start..start + row_bytes].copy_from_slice(pixels);
    }
}

/// The character's picture, or that of the replacement character.
fn glyph(character: char) -> Option<&'static unifont::Glyph> {
    get_glyph(character).or_else(|| get_glyph('\u{FFFD}'))
}

fn advance(character: char) -> usize {
    glyph(character).map_or(0, unifont::Glyph::get_width)
}

fn text_width(text: &str) -> usize {
    text.chars().map(advance).sum()
}

fn write(sheet: &mut RgbImage, text: &str, left: usize, top: usize) {
    let mut left = left;
    for character in text.chars() {
        let Some(glyph) = glyph(character) else { continue };
        for (y, x) in (0..LINE).flat_map(|y| (0..glyph.get_width()).map(move |x| (y, x))) {
            if glyph.get_pixel(x, y) && left + x < sheet.width && top + y < sheet.height {
                let start = ((top + y) * sheet.width + left + x) * 3;
                sheet.data[start..start + 3].copy_from_slice(&INK);
            }
        }
        left += glyph.get_width();
    }
}

/// The text in at most `lines` lines of at most `width` pixels: broken between words, and inside a word that is too long.
fn wrap(text: &str, width: usize, lines: usize) -> Vec<String> {
    let mut wrapped = vec![String::new()];
    for word in text.split_whitespace() {
        let line = wrapped.last().map_or("", String::as_str);
        let fits = text_width(line) + advance(' ') + text_width(word) <= width;
        if !line.is_empty() && !fits {
            wrapped.push(String::new());
        } else if !line.is_empty() {
            push(&mut wrapped, ' ');
        }
        for character in word.chars() {
            let line = wrapped.last().map_or("", String::as_str);
            if !line.is_empty() && text_width(line) + advance(character) > width {
                wrapped.push(String::new());
            }
            push(&mut wrapped, character);
        }
        if wrapped.len() > lines {
            break;
        }
    }
    if wrapped.len() > lines {
        wrapped.truncate(lines);
        if let Some(last) = wrapped.last_mut() {
            while text_width(last) + advance('…') > width && last.pop().is_some() {}
            last.push('…');
        }
    }
    wrapped
}

fn push(lines: &mut [String], character: char) {
    if let Some(line) = lines.last_mut() {
        line.push(character);
    }
}

/// Cells of `count` samples that the seed chooses; of one that cannot be read the text says why.
///
/// # Errors
/// When a shard's index can no longer be read.
pub fn keyed_samples(dataset: &Dataset, count: usize, seed: u64) -> Result<Vec<Cell>, DataError> {
    let permutation = Permutation::new(dataset.len(), key(seed, &[SHEET]));
    (0..dataset.len().min(count as u64))
        .map(|at| {
            let index = permutation.apply(at);
            let read = guarded(|| {
                let raw = dataset.read(index, Pick::First)?;
                Ok(Cell { picture: Some(decode(&raw.image)?), caption: raw.caption })
            });
            read.or_else(|error| {
                let (shard, key) = dataset.key(index)?;
                Ok(Cell { picture: None, caption: format!("{shard} {key}: {error}") })
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_wraps_between_words_and_ends_in_an_ellipsis() {
        assert_eq!(wrap("a cat on a mat", 64, 3), ["a cat on", "a mat"]);
        assert_eq!(wrap("a cat on a mat", 64, 1), ["a cat o…"]);
        assert_eq!(wrap("abcdefghijkl", 64, 2), ["abcdefgh", "ijkl"]);
        // Wide characters count twice.
        assert_eq!(wrap("一只猫坐在垫子上", 64, 9), ["一只猫坐", "在垫子上"]);
        assert_eq!(wrap("x", 64, 0), Vec::<String>::new());
        assert_eq!(wrap("", 64, 2), [""]);
    }

    #[test]
    fn pictures_keep_their_shape_and_stand_in_their_places() {
        let red = RgbImage { width: 4, height: 2, data: [255, 0, 0].repeat(8) };
        let cell = |picture| Cell { picture, caption: "I".to_owned() };
        let sheet = contact_sheet(&[cell(Some(red)), cell(None), cell(None)], Layout { columns: 2, side: 8, lines: 1 });
        assert_eq!((sheet.width, sheet.height), (2 * (8 + 12), 2 * (8 + 12 + 16)));
        let pixel = |x: usize, y: usize| <[u8; 3]>::try_from(&sheet.data[(y * sheet.width + x) * 3..][..3]).unwrap();
        // Fitted to 8 x 4 in the middle of its square.
        assert_eq!(
            [pixel(6, 7), pixel(6, 8), pixel(13, 11), pixel(13, 12)],
            [[255; 3], [255, 0, 0], [255, 0, 0], [255; 3]]
        );
        let ink = |x: usize| (0..16).any(|y| (0..8).any(|dx| pixel(x + dx, 17 + y) == INK));
        assert!(ink(6) && ink(26));
    }
}
