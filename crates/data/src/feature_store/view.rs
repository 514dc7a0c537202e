//! The views of an image that the epochs take in turn.

use crate::image::{Augment, Frame};
use crate::keyed::key;

/// Sets the views' numbers apart from those of any run's seed; never changes, since all runs share the views.
const VIEWS: u64 = 0x7669_6577_7320_6f66;

/// View number `view` of the image with this digest: keyed by nothing else, so that every run and stage sees the same.
pub(crate) fn view_frame(width: usize, height: usize, augment: Augment, image_id: u64, view: u64) -> Frame {
    match augment {
        Augment::None => Frame::whole(width, height),
        Augment::CropFlip => Frame::crop_flip(width, height, key(VIEWS, &[image_id]), view),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_differ_from_each_other_and_between_images() {
        let frame = |augment, id, view| view_frame(64, 64, augment, id, view);
        assert_ne!(frame(Augment::CropFlip, 1, 0), frame(Augment::CropFlip, 1, 1));
        assert_ne!(frame(Augment::CropFlip, 1, 0), frame(Augment::CropFlip, 2, 0));
        assert_eq!(frame(Augment::None, 1, 0), frame(Augment::None, 2, 1));
    }

    #[test]
    fn a_view_never_changes() {
        let view = view_frame(64, 64, Augment::CropFlip, 1, 3);
        assert_eq!(view, Frame::crop_flip(64, 64, 5_047_704_270_920_242_309, 3));
    }
}
