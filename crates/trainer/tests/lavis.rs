//! LAVIS' files in the trainer: its ViT computes what LAVIS computed.

use std::path::{Path, PathBuf};

use blip2_model::vision::VisionConfig;
use blip2_torchx::params::TensorSource;
use blip2_trainer::config::AutoOr;
use blip2_trainer::model_files::{ModelFiles, load_image_encoder};
use blip2_trainer::preprocessing::Preprocessing;
use blip2_weights::{ModelDir, Part, SafetensorsFile};
use tch::{Device, Kind, Tensor};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../weights/tests/fixtures/torch_files").join(name)
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.to_kind(Kind::Double).norm().double_value(&[]);
    norm(&(a - b)) / norm(b)
}

#[test]
fn the_vit_computes_the_features_that_lavis_computed() {
    let dir = ModelDir::open(&fixture("lavis_vit.pth")).unwrap();
    let config = VisionConfig::from_json(dir.part(Part::Vision).unwrap().config).unwrap();
    let depth = config.depth(None).unwrap();
    let preprocessing = Preprocessing::of(dir.path(), &config, &AutoOr::Auto).unwrap();
    let (encoder, _) = load_image_encoder(&dir, &config, depth, preprocessing, Device::Cpu, Kind::Float).unwrap();
    let expected = SafetensorsFile::open(&fixture("lavis_vit_expected.safetensors")).unwrap();
    let features = encoder.features_of_normalised(&expected.read("pixels").unwrap());
    let error = relative(&features, &expected.read("features").unwrap());
    println!("LAVIS' ViT: relative error {error:.1e}");
    assert!(error <= 1e-5, "{error}");
}

#[test]
fn a_file_of_lavis_is_no_whole_model() {
    for name in ["lavis_stage1.pth", "lavis_vit.pth"] {
        let message = ModelFiles::open(fixture(name)).err().unwrap().to_string();
        assert!(message.contains("expected a whole model, got a file of LAVIS"), "{message}");
    }
}
