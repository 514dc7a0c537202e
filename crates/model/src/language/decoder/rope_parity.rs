//! Every kind of `rope_scaling` gives the frequencies of `transformers` 4.57.1 (`scripts/fixtures/rope.py`).

use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::DecoderConfig;
use super::config::Positions;

/// The largest relative difference.
fn difference(ours: &Tensor, theirs: &Value) -> f64 {
    let ours = Vec::<f64>::try_from(ours.to_kind(Kind::Double)).unwrap();
    let theirs: Vec<f64> = serde_json::from_value(theirs.clone()).unwrap();
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(&theirs).map(|(ours, theirs)| (ours / theirs - 1.0).abs()).fold(0.0, f64::max)
}

#[test]
fn frequencies_equal_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/language/rope.json");
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(cases.len() > 30);
    for case in &cases {
        let said = format!("{} with {}", case["config"]["model_type"], case["config"]["rope_scaling"]);
        let config = DecoderConfig::from_json(&case["config"]).unwrap().unwrap_or_else(|e| panic!("{said}: {e}"));
        let Positions::Rotary(tables) = config.positions else { panic!("{said}: nothing is turned") };
        let (frequencies, long, factor) = tables[0].frequencies(Device::Cpu);
        let error = difference(&frequencies, &case["frequencies"]);
        assert!(error < 1e-6, "{said}: frequencies differ by {error:e}");
        let expected = case["attention_factor"].as_f64().unwrap();
        assert!((factor / expected - 1.0).abs() < 1e-12, "{said}: attention factor {factor}, expected {expected}");
        assert_eq!(long.is_some(), !case["long"].is_null(), "{said}");
        if let Some((long, original)) = long {
            assert_eq!(case["long"]["behind"], original, "{said}");
            let error = difference(&long, &case["long"]["frequencies"]);
            assert!(error < 1e-6, "{said}: frequencies of long texts differ by {error:e}");
        }
    }
}
