//! Which hidden state of the image encoder the Q-Former reads.

use blip2_model::vision::VisionConfig;
use blip2_weights::{ModelDir, ModelKind};
use serde_json::Value;

use crate::assembly::qformer_init::QFormerInit;
use crate::config::{AutoOr, Config};
use crate::error::Error;

const KEY: &str = "vision_feature_layer";

/// The depth of `model.vision.layer` in the tower of `dir`.
///
/// `auto` is the layer that a whole BLIP-2 model was trained on, which is its last where it names none, and else the family's.
///
/// # Errors
/// A layer that the tower does not have, or another than the Q-Former was trained on.
pub(crate) fn depth(config: &Config, dir: &ModelDir, vision: &VisionConfig, init: &QFormerInit) -> Result<i64, Error> {
    let layer = match config.model.vision.layer {
        AutoOr::Given(layer) => Some(layer),
        AutoOr::Auto if dir.kind() == &ModelKind::WholeBlip2 => recorded(dir)?.or(Some(-1)),
        AutoOr::Auto => None,
    };
    let depth = vision.depth(layer).map_err(|source| Error::Model { path: dir.path().into(), source })?;
    match trained_on(init)? {
        Some(trained) if trained != depth => {
            let init = init.path.display();
            let expected = format!("{trained}, the hidden state that model.qformer.init ({init}) was trained on");
            let advice = format!("write model.vision.layer: {trained}, or begin from a BERT");
            Err(Error::key("model.vision.layer", expected, depth, &advice))
        }
        _ => Ok(depth),
    }
}

/// The depth that the source of the Q-Former was trained on, where it says so.
fn trained_on(init: &QFormerInit) -> Result<Option<i64>, Error> {
    let Some(layer) = recorded(&init.dir)? else { return Ok(None) };
    let Some(vision) = init.dir.config().get("vision_config") else { return Ok(None) };
    let depth = VisionConfig::from_json(vision).and_then(|vision| vision.depth(Some(layer)));
    depth.map(Some).map_err(|source| Error::Model { path: init.path.clone(), source })
}

fn recorded(dir: &ModelDir) -> Result<Option<i64>, Error> {
    match dir.config().get(KEY) {
        None | Some(Value::Null) => Ok(None),
        Some(layer) => layer.as_i64().map(Some).ok_or_else(|| {
            Error::file(
                dir.path().join("config.json"),
                format!("{KEY}: expected the number of a hidden state, got {layer}"),
            )
        }),
    }
}
