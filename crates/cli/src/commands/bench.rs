//! `bench`: how fast the parts are on this machine.

use std::path::PathBuf;
use std::thread;

use anyhow::Result;
use blip2_trainer::bench::{
    Augment, BenchOptions, JpegSize, PackingOptions, PackingReport, StepReport, Throughput, ThroughputOptions, packing,
    stage1_step, throughput,
};
use clap::{Args, Subcommand, ValueEnum};

use super::shards::{PackedArguments, SetArguments};
use crate::arguments::{DeviceArgument, Precision};
use crate::output::{print, print_json};

const LOADER_EXAMPLES: &str = "\
Examples:
  blip2 bench loader 'shards/*.tar'
  blip2 bench loader 'shards/{00000..00003}.tar' --threads 2 --tokenizer models/bert --json

Batches come from the training loader with BLIP-2's transform, in training's order. The set is read --passes times, the quickest is told.
Times of the phases are those of all decoding threads together; waiting is that of whoever takes the batches.";

const PACK_EXAMPLES: &str = "\
Examples:
  blip2 bench pack --source pictures
  blip2 bench pack --source pictures --longest-side 384 --threads 2 --scratch /data --json

What is packed is what `blip2 shards pack` takes, by the same flags. The shards are written below --scratch, synced, and removed behind each of the
--passes, of which the quickest is told. Memory is the most that the process has held, so measure with and without --longest-side in two commands.";

const EXAMPLES: &str = "\
Examples:
  blip2 bench step --stage 1 --batch 8
  blip2 bench step --stage 1 --batch 64 --precision bf16 --device cuda --steps 50 --json

The model is the paper's: a bert-base Q-Former with 32 queries behind ViT-g's features, dropout on; weights and features are random.
Forward and backward are measured together, the optimizer apart.";

const ALL_EXAMPLES: &str = "\
Examples:
  blip2 bench loader 'shards/*.tar'
  blip2 bench pack --source pictures
  blip2 bench step --stage 1 --batch 8";

/// Measure the throughput of the parts on this machine
#[derive(Subcommand)]
#[command(after_help = ALL_EXAMPLES)]
pub(crate) enum BenchCommand {
    Loader(LoaderArguments),
    Pack(PackArguments),
    Step(StepArguments),
}

/// Measure the data loader on shards, and where its time goes
#[derive(Args)]
#[command(after_help = LOADER_EXAMPLES)]
pub(crate) struct LoaderArguments {
    #[command(flatten)]
    set: SetArguments,
    /// Decoding threads; left out, as many as there are cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Samples a batch
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Side of the images in the batch
    #[arg(long, value_name = "PIXELS", default_value_t = 224, value_parser = clap::value_parser!(u16).range(1..))]
    size: u16,
    /// What is done to the images
    #[arg(long, value_name = "HOW", default_value = "crop_flip")]
    augment: AugmentArgument,
    /// The size at which JPEGs are decoded
    #[arg(long, value_name = "SIZE", default_value = "full")]
    jpegs: JpegsArgument,
    /// Folder of the tokenizer; left out, captions are cleaned and not tokenised
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Times that the set is read
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    passes: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "snake_case")]
enum AugmentArgument {
    /// Random resized crop and horizontal flip
    CropFlip,
    /// The evaluation transform
    None,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum JpegsArgument {
    /// Whole
    Full,
    /// At a half, quarter or eighth of their sides where the crop allows it
    Reduced,
}

/// Measure packing pictures into shards: time and memory
#[derive(Args)]
#[command(after_help = PACK_EXAMPLES)]
pub(crate) struct PackArguments {
    #[command(flatten)]
    packed: PackedArguments,
    /// Threads; left out, as many as there are cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Folder below which the shards lie meanwhile; left out, the system's for temporary files
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Times that all is packed
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    passes: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Measure a training step behind the frozen image encoder
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct StepArguments {
    /// The stage
    #[arg(long, value_name = "1", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=1))]
    stage: u8,
    /// Samples a step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..))]
    batch: u32,
    /// Number format of the step
    #[arg(long, value_name = "FORMAT", default_value = "fp32")]
    precision: Precision,
    #[command(flatten)]
    device: DeviceArgument,
    /// Steps measured, of which the median is told
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Width and tokens of ViT-g's features of an image of 224 pixels.
const VIT_G: (i64, i64) = (1408, 257);

impl BenchCommand {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            BenchCommand::Loader(arguments) => arguments.run(),
            BenchCommand::Pack(arguments) => arguments.run(),
            BenchCommand::Step(arguments) => arguments.run(),
        }
    }
}

/// Batches decoded ahead, as training's default.
const PREFETCH: usize = 4;

/// One thread a core where it is not said.
fn threads(given: Option<u16>) -> usize {
    given.map_or_else(|| thread::available_parallelism().map_or(1, usize::from), usize::from)
}

impl LoaderArguments {
    fn run(self) -> Result<()> {
        let report = throughput(&ThroughputOptions {
            open: self.set.options(),
            patterns: self.set.patterns,
            threads: threads(self.threads),
            batch: self.batch as usize,
            prefetch: PREFETCH,
            image_size: self.size.into(),
            augment: match self.augment {
                AugmentArgument::CropFlip => Augment::CropFlip,
                AugmentArgument::None => Augment::None,
            },
            jpegs: match self.jpegs {
                JpegsArgument::Full => JpegSize::Full,
                JpegsArgument::Reduced => JpegSize::Reduced,
            },
            tokenizer: self.tokenizer,
            passes: self.passes as usize,
        })?;
        if self.json { print_json(&report) } else { print(loader_lines(&report)) }
    }
}

fn loader_lines(report: &Throughput) -> String {
    let Throughput { images, seconds, threads, images_per_s, mb_per_s, timings, .. } = report;
    let mut text = format!(
        "{images} images in {seconds:.2} s with {threads} threads: {images_per_s:.1} images/s, {mb_per_s:.1} MB/s of image files"
    );
    if report.bad > 0 {
        text += &format!("\n{} samples could not be used and were replaced", report.bad);
    }
    let all_threads_s = *threads as f64 * seconds;
    let caption = if report.tokenised { "text" } else { "text (no tokenizer)" };
    for (phase, spent_s, of_s) in [
        ("read", timings.read_s, all_threads_s),
        ("decode", timings.decode_s, all_threads_s),
        ("resize", timings.resize_s, all_threads_s),
        (caption, timings.text_s, all_threads_s),
        ("idle", report.idle_s, all_threads_s),
        ("wait for a batch", report.wait_s, *seconds),
    ] {
        let share = (spent_s / of_s).clamp(0.0, 1.0);
        let bar = "#".repeat((share * 40.0).round() as usize);
        text += format!("\n{phase:<20} {spent_s:>9.3} s {:>5.1} %  {bar}", share * 100.0).trim_end();
    }
    text
}

impl PackArguments {
    fn run(self) -> Result<()> {
        let scratch = self.scratch.unwrap_or_else(std::env::temp_dir);
        let report = packing(&PackingOptions {
            pack: self.packed.options(scratch),
            threads: threads(self.threads),
            passes: self.passes as usize,
        })?;
        if self.json { print_json(&report) } else { print(packing_lines(&report)) }
    }
}

fn packing_lines(report: &PackingReport) -> String {
    let PackingReport { pictures, left_out, seconds, pictures_per_s, mb_per_s, shards_mb, threads, .. } = report;
    let reencoded = report.longest_side.map_or("as they are".to_owned(), |side| format!("shrunk to {side} pixels"));
    let mut text = format!(
        "{pictures} pictures {reencoded} in {seconds:.2} s with {threads} threads: {pictures_per_s:.1} pictures/s, {mb_per_s:.1} MB/s of image files; \
         {shards_mb:.1} MB of shards"
    );
    if *left_out > 0 {
        text += &format!("\n{left_out} rows left out");
    }
    if let Some(mib) = report.peak_memory_mib {
        text += &format!("\n{mib:.0} MiB of memory at most");
    }
    text
}

impl StepArguments {
    fn run(self) -> Result<()> {
        let report = stage1_step(&BenchOptions {
            batch: self.batch as usize,
            precision: self.precision.into(),
            device: self.device.select()?,
            steps: self.steps as usize,
            dropout: 0.1,
            width: VIT_G.0,
            tokens: VIT_G.1,
        })?;
        if self.json { print_json(&report) } else { print(lines(&report)) }
    }
}

fn lines(report: &StepReport) -> String {
    let StepReport { stage, batch, precision, device, trainable_parameters, .. } = report;
    let StepReport { median_s, forward_s, samples_per_s, optimizer_s, .. } = report;
    let mut text = format!(
        "stage {stage}, batch {batch}, {precision} on {device}: {trainable_parameters} trainable parameters\n\
         {samples_per_s:.2} samples/s: a step takes {median_s:.4} s, of which forward {forward_s:.4} s; the optimizer {optimizer_s:.4} s more"
    );
    if let Some(mib) = report.peak_memory_mib {
        text += &format!("\n{mib:.0} MiB of memory at most");
    }
    text
}
