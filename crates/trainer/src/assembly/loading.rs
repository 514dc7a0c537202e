//! Filling a part with its weights, and what became of them.

use std::fmt;
use std::time::Instant;

use blip2_torchx::params::{LoadPlan, LoadReport, ParamStore, TensorSource};
use blip2_weights::unused_modules;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The frozen image encoder, as reports call it.
pub const IMAGE_ENCODER: &str = "image encoder";
/// What is trained.
pub const QFORMER: &str = "Q-Former";
/// The frozen language model.
pub const LANGUAGE_MODEL: &str = "language model";

/// What became of the tensors of one part, as `run.json` keeps it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadedPart {
    /// [`IMAGE_ENCODER`], [`QFORMER`] or [`LANGUAGE_MODEL`].
    pub part: String,
    /// Where its weights lie.
    pub source: String,
    /// How many numbers it holds.
    pub parameters: u64,
    /// How long reading took.
    pub load_s: f64,
    /// Tensors filled from the source.
    pub loaded: usize,
    /// Of those, cast to another dtype.
    pub cast: usize,
    /// Tensors that the source cannot have and that keep their initial values.
    pub fresh: usize,
    /// Tensors of the source that this stage drops.
    pub dropped: usize,
    /// Modules of those, with their counts.
    pub dropped_modules: Option<String>,
    /// Of the image encoder: which file says how its pixels are made, or that none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pixels: Option<String>,
}

/// Fills a store and says what became of the source's tensors.
///
/// # Errors
/// Tensors that are missing, unexpected, misshapen or unreadable.
pub fn fill(part: &str, params: &ParamStore, source: &dyn TensorSource, plan: &LoadPlan) -> Result<LoadedPart, Error> {
    let begun = Instant::now();
    let report = params.load(source, plan)?;
    let load_s = begun.elapsed().as_secs_f64();
    let LoadReport { loaded, cast, fresh, unused } = &report;
    Ok(LoadedPart {
        part: part.into(),
        source: source.origin(),
        parameters: params.num_elements(),
        load_s,
        loaded: loaded.len(),
        cast: cast.len(),
        fresh: fresh.len(),
        dropped: unused.len(),
        dropped_modules: unused_modules(&report),
        pixels: None,
    })
}

impl fmt::Display for LoadedPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LoadedPart { part, source, parameters, load_s, loaded, cast, fresh, dropped, .. } = self;
        let millions = *parameters as f64 / 1e6;
        write!(f, "{part}: {millions:.1}M parameters in {load_s:.1} s from {source}: {loaded} tensors loaded")?;
        for (count, what) in [(cast, "cast"), (fresh, "fresh"), (dropped, "dropped")] {
            if *count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        self.dropped_modules.iter().try_for_each(|modules| write!(f, " ({modules})"))?;
        self.pixels.iter().try_for_each(|pixels| write!(f, "; {pixels}"))
    }
}
