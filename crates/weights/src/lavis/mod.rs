//! LAVIS' checkpoints, in and out.
//!
//! LAVIS saves `{"model": …, "optimizer": …, "config": …, "scaler": …, "epoch": …}` with what was trained and, of the frozen towers,
//! nothing. `names` maps its names to ours and back, `vit` reads its `eva_vit_g.pth`, `implied` tells from the shapes the configuration that such
//! files lack, `save` writes one.

mod implied;
mod names;
mod save;
mod vit;

pub(crate) use implied::{Kind, checkpoint_config, checkpoint_vision, kind_of, vit_config};
pub use names::Projection;
pub(crate) use names::our_name;
pub use save::{LavisCheckpoint, save_lavis};
pub(crate) use vit::vit_recipes;

/// What stands in front of the image encoder's names in a checkpoint that holds one.
pub(crate) const VISUAL_ENCODER: &str = "visual_encoder.";
/// BERT's buffer of the numbers 0, 1, 2, …; LAVIS' models expect it in a checkpoint.
pub(crate) const POSITION_IDS: &str = "Qformer.bert.embeddings.position_ids";

/// Whether this tensor of a checkpoint, by our name or else by its own, is no parameter of ours: a buffer, a tied copy, a frozen tower.
pub(crate) fn dropped(name: &str) -> bool {
    name == POSITION_IDS
        || ["cls.predictions.decoder.", VISUAL_ENCODER, "opt_model.", "t5_model.", "llm_model."]
            .iter()
            .any(|module| name.starts_with(module))
}
