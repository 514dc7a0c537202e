//! Parts of a model by names and shapes alone, to compare files with: they take no memory.

use blip2_model::language::LanguageConfig;
use blip2_model::vision::VisionConfig;
use blip2_model::{Blip2Config, Stage1, Stage2};
use blip2_torchx::params::{LoadError, LoadPlan, ParamStore, TensorSource};
use tch::Kind;

/// The first `depth` blocks of an image encoder.
pub(crate) fn image_encoder(config: &VisionConfig, depth: i64) -> ParamStore {
    let store = ParamStore::declared(Kind::Float);
    config.build(&store.root().pp("vision_model"), depth);
    store
}

/// A language model.
pub(crate) fn language_model(config: &LanguageConfig) -> ParamStore {
    let store = ParamStore::declared(Kind::Float);
    config.build(&store.root().pp("language_model"));
    store
}

/// What stage 2 trains before a language model of this width; without one, what stage 1 trains.
pub(crate) fn trained(config: &Blip2Config, language_width: Option<i64>) -> ParamStore {
    let store = ParamStore::declared(Kind::Float);
    match language_width {
        None => drop(Stage1::new(&store.root(), config)),
        Some(width) => drop(Stage2::new(&store.root(), config, width, Vec::new())),
    }
    store
}

/// Compares declared parts with a source, before anything of the sizes that it claims is built.
///
/// # Errors
/// Tensors that are missing, unexpected or misshapen.
pub(crate) fn compare(declared: &ParamStore, source: &dyn TensorSource, plan: &LoadPlan) -> Result<(), LoadError> {
    declared.audit(source, plan).into_result(source).map(drop)
}
