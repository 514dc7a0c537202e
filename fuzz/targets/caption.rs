//! The caption cleaner: any text becomes at most 50 words without surrounding spaces.
#![no_main]

use blip2_data::{Clean, clean_caption};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let cleaned = clean_caption(text, Clean::Blip);
    assert!(cleaned.split(' ').count() <= 50, "{cleaned:?}");
    assert_eq!(cleaned.trim_matches(' '), cleaned);
    assert!(!cleaned.contains(['.', '!', '"', '(', ')', '*', '#', ':', ';', '~']), "{cleaned:?}");
    assert!(!cleaned.contains("  "), "{cleaned:?}");
    assert_eq!(clean_caption(text, Clean::None), text.trim());
});
