//! The views of an image that the epochs take in turn.

use crate::image::{Augment, Filter, RgbImage, evaluate_transform, train_transform};
use crate::keyed::key;

/// Sets the views' numbers apart from those of any run's seed; never changes, since all runs share the views.
const VIEWS: u64 = 0x7669_6577_7320_6f66;

/// View number `view` of the image with this digest: keyed by nothing else, so that every run and stage sees the same.
///
/// # Shapes
/// Returns `[3, size, size]`.
pub(crate) fn view_pixels(
    image: &RgbImage,
    size: usize,
    filter: Filter,
    augment: Augment,
    image_id: u64,
    view: u64,
) -> Vec<u8> {
    match augment {
        Augment::None => evaluate_transform(image, size, filter),
        Augment::CropFlip => train_transform(image, size, filter, key(VIEWS, &[image_id]), view),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture() -> RgbImage {
        let data = (0..64 * 64 * 3).map(|i| (i * 7 % 251) as u8).collect();
        RgbImage { width: 64, height: 64, data }
    }

    #[test]
    fn views_differ_from_each_other_and_between_images() {
        let pixels = |augment, id, view| view_pixels(&picture(), 16, Filter::Bicubic, augment, id, view);
        assert_ne!(pixels(Augment::CropFlip, 1, 0), pixels(Augment::CropFlip, 1, 1));
        assert_ne!(pixels(Augment::CropFlip, 1, 0), pixels(Augment::CropFlip, 2, 0));
        assert_eq!(pixels(Augment::None, 1, 0), pixels(Augment::None, 2, 1));
    }

    #[test]
    fn a_view_never_changes() {
        let view = view_pixels(&picture(), 16, Filter::Bicubic, Augment::CropFlip, 1, 3);
        assert_eq!(view, train_transform(&picture(), 16, Filter::Bicubic, 5_047_704_270_920_242_309, 3));
    }
}
