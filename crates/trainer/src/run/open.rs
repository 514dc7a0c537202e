//! From a configuration to a run that is ready for its next step.

use std::rc::Rc;

use blip2_data::BadSamples;
use blip2_torchx::adamw::{AdamW, AdamWConfig};
use blip2_torchx::grad_scaler::GradScaler;
use tch::Device;

use super::Run;
use super::opening::Opening;
use crate::assembly::Assembly;
use crate::assembly::blueprint::Blueprint;
use crate::config::{Config, FeatureCache, Precision};
use crate::data::TrainData;
use crate::data::index_lines::SetOpening;
use crate::data::sets::DataSets;
use crate::error::Error;
use crate::evaluation::HeldOutSet;
use crate::features::memory::MemoryCaches;
use crate::ranks::Ranks;
use crate::run::schedule::LearningRate;
use crate::step::Stepper;
use crate::task::ForwardOptions;
use crate::train::TrainRequest;

impl Run {
    /// Opens the folder, builds the stage, and takes up the newest checkpoint where there is one.
    ///
    /// # Errors
    /// A folder in use or of another configuration, weights or data that do not fit, ranks that were started with different things.
    pub fn open(
        config: &Config,
        blueprint: Blueprint,
        request: &TrainRequest,
        ranks: Rc<dyn Ranks>,
        device: Device,
        caches: &mut MemoryCaches,
    ) -> Result<Run, Error> {
        let opening = Opening::new(config, request, &*ranks);
        let kept = opening.take_folder()?;
        let checkpoint = opening.choose_checkpoint(kept.as_ref().map(|(store, _)| store))?;
        let sets = opening.open_sets(checkpoint.as_ref(), &blueprint)?;
        let assembly = opening.build(blueprint, device)?;
        let mut stepper = new_stepper(config, &assembly, &*ranks)?;
        let state = opening.take_up(checkpoint.as_ref(), &assembly, &mut stepper, &sets)?;
        let (data, held_out) = opening.fill_caches(&sets, &assembly, caches)?;
        let loader = data.loader(state.stream_position, &state.bad_samples)?;
        let begin = |kept| opening.begin(kept, &assembly, &state, checkpoint.is_some());
        let books = kept.map(begin).transpose()?;
        let mut run = Run {
            schedule: LearningRate::new(&config.optimizer, &config.schedule),
            forward: forward_options(config),
            bad_in_a_row: 0,
            good_since: u64::MAX,
            config: config.clone(),
            ranks: Rc::clone(&ranks),
            books,
            assembly,
            data,
            held_out,
            stepper,
            state,
            loader,
        };
        run.introduce()?;
        Ok(run)
    }

    /// Reads a held-out batch, builds the stage and runs one batch forward and backward; writes nothing but, into the folder that `config`
    /// names, the indices of shards that have none. Returns a line about it.
    ///
    /// # Errors
    /// Everything that would stop the run before its first step.
    pub fn try_one_batch(
        config: &Config,
        blueprint: Blueprint,
        device: Device,
        ranks: &dyn Ranks,
    ) -> Result<String, Error> {
        let mut one = config.clone();
        one.data.feature_cache = FeatureCache::Off;
        let sets = DataSets::open(&one, SetOpening { say: None, dry_run: true }, ranks)?;
        if let Some(held_out) = &sets.held_out {
            HeldOutSet::check(&one, held_out, &blueprint)?;
        }
        let assembly = Assembly::build(config, blueprint, device)?;
        let mut caches = MemoryCaches::default();
        let data = TrainData::open(&one, &sets, &assembly, ranks, &mut caches, &mut |_, _| {})?;
        let host = data.loader(0, &BadSamples::default())?.next_batch()?;
        let mut stepper = new_stepper(config, &assembly, ranks)?;
        let micro_batches = data.micro_batches(host, &assembly.encoder, ranks)?;
        let metrics = stepper.step(&*assembly.task, micro_batches, &forward_options(config), 0, 0.0, ranks)?;
        let values: Vec<String> = metrics.iter().map(|(n, t)| format!("{n} {:.4}", t.double_value(&[]))).collect();
        let trained = assembly.task.params().num_elements();
        Ok(format!(
            "config, weights and data are good; {trained} trainable parameters, {} samples; first batch: {}",
            data.samples(),
            values.join(", ")
        ))
    }

    /// Logs what is fixed for the whole run.
    fn introduce(&mut self) -> Result<(), Error> {
        let Some(books) = &mut self.books else { return Ok(()) };
        books.quarantine(&self.data.problems())?;
        books.quarantine(self.data.quarantined())?;
        if let Some(held_out) = &self.held_out {
            books.quarantine(&held_out.problems())?;
            books.quarantine(held_out.quarantined())?;
        }
        self.data.filters().iter().for_each(|line| books.telemetry.note(line));
        self.data.cache_introduction().iter().for_each(|line| books.telemetry.note(line));
        let held_out = self.held_out.as_ref().and_then(HeldOutSet::cache_introduction);
        held_out.iter().for_each(|line| books.telemetry.note(line));
        let ranks = match self.ranks.world() {
            1 => String::new(),
            world => format!(", {world} ranks"),
        };
        books.telemetry.note(&format!(
            "{}: {} trainable parameters, {} samples{ranks}",
            books.folder.path().display(),
            self.assembly.task.params().num_elements(),
            self.data.samples(),
        ));
        Ok(())
    }
}

fn new_stepper(config: &Config, assembly: &Assembly, ranks: &dyn Ranks) -> Result<Stepper, Error> {
    let o = &config.optimizer;
    let adamw = AdamWConfig { betas: (o.betas[0], o.betas[1]), eps: o.eps, weight_decay: o.weight_decay };
    let params = assembly.task.params();
    let scaler = GradScaler::new(params.device(), config.run.precision == Precision::Fp16);
    let gradients = ranks.gradients(params, config.run.gradient_exchange)?;
    Ok(Stepper::new(AdamW::new(params.entries(), adamw), scaler, gradients, params, o.clip_norm))
}

fn forward_options(config: &Config) -> ForwardOptions {
    ForwardOptions {
        autocast: config.run.precision.autocast(),
        dropout: config.model.qformer.dropout,
        seed: config.run.seed,
    }
}
