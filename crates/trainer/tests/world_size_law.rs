//! One rank and many make the same run: losses, drawn negatives and weights, dropout on. Ranks are threads here.

use std::cell::RefCell;
use std::net::TcpListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use blip2_model::qformer::TextBatch;
use blip2_torchx::adamw::{AdamW, AdamWConfig};
use blip2_torchx::grad_scaler::GradScaler;
use blip2_torchx::params::ParamStore;
use blip2_trainer::Error;
use blip2_trainer::batch::{Batch, Negatives, Share, TargetRule, Targets};
use blip2_trainer::config::GradientExchange;
use blip2_trainer::model_files::ModelFiles;
use blip2_trainer::ranks::{Launch, Meeting, Ranks, together};
use blip2_trainer::step::Stepper;
use blip2_trainer::task::stage1::{Stage1Options, Stage1Task};
use blip2_trainer::task::{Evaluation, ForwardOptions, HeldOut, Losses, Reference, Task};
use tch::{Device, IndexOp, Kind, Tensor};

const STEPS: u64 = 50;
const GLOBAL_BATCH: i64 = 16;
const TOKENS: i64 = 6;
const FORWARD: ForwardOptions = ForwardOptions { autocast: None, dropout: 0.1, seed: 11 };

/// Stage 1 that writes down whom it drew, where a batch is computed at once.
struct Recording {
    task: Stage1Task,
    drawn: RefCell<Vec<Vec<i64>>>,
}

impl Task for Recording {
    fn params(&self) -> &ParamStore {
        &self.task.params
    }

    fn forward(&self, batch: &Batch, pass: &ForwardOptions, ranks: &dyn Ranks) -> Result<Losses, Error> {
        let out = self.task.losses(batch, pass, ranks)?;
        let drawn = Tensor::cat(&[&out.contrast.negative_image, &out.contrast.negative_text], 0);
        self.drawn.borrow_mut().push(Vec::try_from(drawn).unwrap());
        let total = (&out.contrast.loss + &out.itm + &out.itg) * batch.share.samples;
        Ok(Losses { metrics: vec![("loss", total.detach())], total })
    }

    fn target_rule(&self) -> TargetRule {
        self.task.target_rule()
    }

    fn reference(&self, _: &str, _: usize) -> Option<Reference> {
        None
    }

    fn evaluate(&self, _: &mut HeldOut, _: &ForwardOptions) -> Result<Evaluation, Error> {
        Ok(Evaluation::default())
    }
}

/// Numbers in [0, 1) without order, each a function of its row's position.
fn numbers(positions: &Tensor, columns: i64, salt: f64) -> Tensor {
    let at =
        positions.to_kind(Kind::Double).unsqueeze(1) * columns + Tensor::arange(columns, (Kind::Double, Device::Cpu));
    let x = ((at + 1.0) * 12.9898 + salt).sin() * 43_758.545_3;
    (&x - x.floor()).to_kind(Kind::Float).clamp_max(0.999_999)
}

/// `rows` samples of the stream from `first` on, a part of a global batch.
fn batch(first: i64, rows: i64, width: i64) -> Batch {
    let positions = Tensor::arange_start(first, first + rows, (Kind::Int64, Device::Cpu));
    let ids = (numbers(&positions, TOKENS, 0.2) * 196.0).to_kind(Kind::Int64) + 4;
    let labels = ids.copy();
    let _ = labels.narrow(1, 0, 1).fill_(-100);
    let share = rows as f64 / GLOBAL_BATCH as f64;
    Batch {
        features: ((numbers(&positions, 5 * width, 0.1) - 0.5) * 4.0).view([rows, 5, width]),
        text: TextBatch::new(ids.copy(), &ids.ones_like()),
        targets: Targets::from_labels(&labels, 0),
        image_ids: positions.shallow_clone(),
        negatives: Negatives::Sample(numbers(&positions, 1, 0.3).i((.., 0)), numbers(&positions, 1, 0.4).i((.., 0))),
        positions,
        share: Share { samples: share, tokens: share },
        sent_as: Kind::Float,
    }
}

/// What one rank of a run saw: the global losses and its own draws by step, and the weights at the end.
struct Seen {
    losses: Vec<f64>,
    drawn: Vec<Vec<i64>>,
    weights: Vec<(String, Tensor)>,
}

/// How a run is computed.
#[derive(Clone, Copy)]
struct How {
    /// Samples of a micro-batch; none: a rank's slice is one.
    micro_batch: Option<i64>,
    exchange: GradientExchange,
}

const PLAIN: How = How { micro_batch: None, exchange: GradientExchange::Fp32 };

fn train(ranks: &dyn Ranks, how: How) -> Result<Seen, Error> {
    let options = Stage1Options { cached: how.micro_batch.is_some(), ..Default::default() };
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/stage1");
    let task = ModelFiles::open(&case)?.stage1_task(Device::Cpu, options)?;
    let named = task.params.entries();
    let width = named.iter().find(|(name, ..)| name == "vision_model.post_layernorm.weight").unwrap().1.size()[0];
    let adamw = AdamW::new(named, AdamWConfig { betas: (0.9, 0.98), eps: 1e-8, weight_decay: 0.05 });
    let gradients = ranks.gradients(&task.params, how.exchange)?;
    let mut stepper = Stepper::new(adamw, GradScaler::new(Device::Cpu, false), gradients, &task.params, 0.0);
    let recording = Recording { task, drawn: RefCell::default() };
    let learned: &dyn Task = if how.micro_batch.is_some() { &recording.task } else { &recording };
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let slice = GLOBAL_BATCH / ranks.world() as i64;
        let rows = how.micro_batch.unwrap_or(slice);
        let first = step as i64 * GLOBAL_BATCH + ranks.rank() as i64 * slice;
        let parts: Vec<_> = (0..slice / rows).map(|part| Ok(batch(first + part * rows, rows, width))).collect();
        let lr = 1e-4 * (step.min(10) as f64) / 10.0;
        let metrics = stepper.step(learned, parts.into_iter(), &FORWARD, step, lr, ranks)?;
        losses.push(metrics.iter().find(|(name, _)| *name == "loss").unwrap().1.double_value(&[]));
    }
    let weights = recording.task.params.entries().into_iter().map(|(name, weight, _)| (name, weight)).collect();
    Ok(Seen { losses, drawn: recording.drawn.into_inner(), weights })
}

/// All ranks' views of a run.
fn run(world: usize, how: How) -> Vec<Seen> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |rank: usize| {
        let patience = Duration::from_secs(60);
        let meeting = Meeting { host: "127.0.0.1".into(), port, served: false, job: String::new(), patience };
        let launch = Launch { rank, world, local_rank: rank, meeting, hang: patience };
        let launch = (world > 1).then_some(&launch);
        together(launch, |reason| panic!("{reason}"), |ranks| train(&**ranks, how)).unwrap()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..world).map(|number| scope.spawn(move || rank(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn one_rank_and_many_see_the_same_losses_and_draw_the_same_negatives() {
    let alone = run(1, PLAIN).pop().unwrap();
    for world in [2, 4] {
        let all = run(world, PLAIN);
        let rows = GLOBAL_BATCH as usize / world;
        let mut differ = 0;
        for (step, expected) in alone.drawn.iter().enumerate() {
            // Columns are the samples of the global batch on any number of ranks; a rank has its rows of both halves.
            let mine = |rank: usize, half: usize| &all[rank].drawn[step][half * rows..][..rows];
            let drawn: Vec<i64> =
                (0..2).flat_map(|half| (0..world).flat_map(move |rank| mine(rank, half).to_vec())).collect();
            differ += drawn.iter().zip(expected).filter(|(a, b)| a != b).count();
            let allowed = if step < 20 { 1e-4 } else { 1e-3 };
            for seen in &all {
                let error = (seen.losses[step] - alone.losses[step]).abs() / alone.losses[step];
                assert!(error < allowed, "{world} ranks, step {step}: {error:e}");
            }
        }
        println!("{world} ranks: {differ} of {} draws differ", 2 * GLOBAL_BATCH as u64 * STEPS);
        // A uniform number within rounding of a boundary may fall on its other side.
        assert!(differ <= 2, "{world} ranks: {differ} draws differ");
        for ((name, weight), (_, expected)) in all[0].weights.iter().zip(&alone.weights) {
            let error = (weight - expected).norm().double_value(&[]) / expected.norm().double_value(&[]).max(1e-3);
            assert!(error < 1e-2, "{world} ranks: {name}: {error:e}");
        }
    }
    assert!(alone.losses[STEPS as usize - 1] < alone.losses[0], "{:?}", alone.losses);
}

/// Micro-batches of one size are the same computation whoever does it, and a sum without rounding is the same in any order.
#[test]
fn in_micro_batches_added_up_exactly_the_number_of_ranks_does_not_show() {
    let how = How { micro_batch: Some(4), exchange: GradientExchange::Exact };
    let alone = run(1, how).pop().unwrap();
    for world in [2, 4] {
        let first = run(world, how).remove(0);
        // What is logged is added up in fp32; what is trained is not.
        let loss = |(a, b): (&f64, &f64)| (a - b).abs() / b;
        let losses = first.losses.iter().zip(&alone.losses).map(loss).fold(0.0, f64::max);
        assert!(losses < 1e-6, "{world} ranks: {losses:e}");
        for ((name, weight), (_, expected)) in first.weights.iter().zip(&alone.weights) {
            assert!(weight.equal(expected), "{world} ranks: {name}");
        }
    }
}
