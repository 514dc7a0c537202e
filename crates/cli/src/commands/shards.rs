//! `shards`: make, index and check tar shards of image-text pairs.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Result, bail};
use blip2_trainer::shards::{Clean, Dataset, OpenOptions, PackOptions, Stats, Summary, pack, reindex, stats, verify};
use clap::{Args, Subcommand, ValueEnum};

use crate::output::{print, print_json, say};
use crate::progress::Progress;

const PACK_EXAMPLES: &str = "\
Examples:
  blip2 shards pack --captions photos/captions.jsonl --out shards
  blip2 shards pack --captions pairs.tsv --images photos --out shards --shard-samples 5000
  blip2 shards pack --captions coco.jsonl --image-field file_name --caption-field text --out shards

A .jsonl file has an object a line, as {\"image\": \"cat.jpg\", \"caption\": \"a cat\"}; a .tsv file has two columns, image and caption, or a
header that names them. Image paths start at --images, else at the captions file. Every image is decoded once; rows that cannot be used
are listed and left out.";

const INDEX_EXAMPLES: &str = "\
Examples:
  blip2 shards index 'shards/{00000..00099}.tar'
  blip2 shards index 'shards/*.tar' --cache-dir ~/.cache/shards

Training builds missing indices by itself; this builds them anew and ahead of time.";

const VERIFY_EXAMPLES: &str = "\
Examples:
  blip2 shards verify 'shards/*.tar'
  blip2 shards verify 'shards/{00000..00099}.tar' --clean none --json

Reads and decodes every sample. The exit code is 1 where a sample cannot be used.";

const STATS_EXAMPLES: &str = "\
Examples:
  blip2 shards stats 'shards/*.tar'
  blip2 shards stats 'shards/{00000..00099}.tar' --json";

/// Make, index and check tar shards of image-text pairs (WebDataset naming)
#[derive(Subcommand)]
pub(crate) enum ShardsCommand {
    Pack(PackArguments),
    Index(IndexArguments),
    Verify(VerifyArguments),
    Stats(StatsArguments),
}

/// Pack a folder of images and a captions file into shards with indices
#[derive(Args)]
#[command(after_help = PACK_EXAMPLES)]
pub(crate) struct PackArguments {
    /// The captions file, .jsonl or .tsv
    #[arg(long, value_name = "FILE")]
    captions: PathBuf,
    /// Folder where the image paths start; left out, the captions file's
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Folder that gets the shards
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Samples a shard
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    shard_samples: u32,
    /// Field or column of the image's path
    #[arg(long, value_name = "NAME", default_value = "image")]
    image_field: String,
    /// Field or column of the caption
    #[arg(long, value_name = "NAME", default_value = "caption")]
    caption_field: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Build the indices of shards anew
#[derive(Args)]
#[command(after_help = INDEX_EXAMPLES)]
pub(crate) struct IndexArguments {
    #[command(flatten)]
    set: SetArguments,
    /// Print one JSON object for each shard
    #[arg(long)]
    json: bool,
}

/// Read and decode every sample, and list what cannot be used
#[derive(Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub(crate) struct VerifyArguments {
    #[command(flatten)]
    set: SetArguments,
    /// How captions are cleaned, since one may be empty afterwards
    #[arg(long, value_name = "HOW", default_value = "blip")]
    clean: CleanArgument,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Count samples, formats, image sizes and caption lengths
#[derive(Args)]
#[command(after_help = STATS_EXAMPLES)]
pub(crate) struct StatsArguments {
    #[command(flatten)]
    set: SetArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub(super) struct SetArguments {
    /// Path patterns of tar shards: *, ?, [...] and {00000..00099}
    #[arg(value_name = "PATTERN", required = true)]
    pub(super) patterns: Vec<String>,
    /// Folder of the indices whose shards lie where nothing can be written
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Field of a .json member that holds the caption
    #[arg(long, value_name = "NAME", default_value = "caption")]
    caption_field: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CleanArgument {
    /// BLIP's cleaning: lower case, few marks, at most 50 words
    Blip,
    /// Case and marks are kept
    None,
}

impl ShardsCommand {
    pub(crate) fn run(self) -> Result<()> {
        match self {
            ShardsCommand::Pack(arguments) => arguments.run(),
            ShardsCommand::Index(arguments) => arguments.run(),
            ShardsCommand::Verify(arguments) => arguments.run(),
            ShardsCommand::Stats(arguments) => arguments.run(),
        }
    }
}

impl SetArguments {
    pub(super) fn options(&self) -> OpenOptions {
        OpenOptions {
            cache_dir: self.cache_dir.clone(),
            caption_field: self.caption_field.clone(),
            progress: Some(counter("shards indexed")),
            ..OpenOptions::default()
        }
    }

    fn open(&self) -> Result<Dataset> {
        Ok(Dataset::open(&self.patterns, &self.options())?)
    }
}

fn counter(what: &'static str) -> Arc<dyn Fn(usize, usize) + Send + Sync> {
    let progress = Progress::new(what);
    Arc::new(move |done, all| progress.tell(done as u64, all as u64))
}

impl PackArguments {
    fn run(self) -> Result<()> {
        let report = pack(&PackOptions {
            captions: self.captions.clone(),
            images: self.images,
            out: self.out,
            shard_samples: self.shard_samples as usize,
            image_field: self.image_field,
            caption_field: self.caption_field,
            progress: Some(counter("rows packed")),
        })?;
        if self.json {
            return print_json(&report);
        }
        for problem in &report.problems {
            say(&format!("warning: left out: {}:{}: {}", self.captions.display(), problem.line, problem.reason));
        }
        for shard in &report.shards {
            print(shard.display())?;
        }
        let (samples, shards, left_out) = (report.samples, report.shards.len(), report.problems.len());
        print(format_args!("{samples} samples in {shards} shards, {left_out} rows left out"))
    }
}

impl IndexArguments {
    fn run(self) -> Result<()> {
        let shards = reindex(&self.set.patterns, &self.set.options())?;
        let (mut samples, mut problems) = (0, 0);
        for shard in &shards {
            let header = &shard.header;
            (samples, problems) = (samples + header.samples, problems + header.problems as usize);
            if self.json {
                let line = serde_json::json!({
                    "shard": shard.path, "bytes": header.tar_bytes, "samples": header.samples, "problems": header.problems
                });
                print_json(&line)?;
            } else {
                print(format_args!(
                    "{}: {} samples, {} problems",
                    shard.path.display(),
                    header.samples,
                    header.problems
                ))?;
            }
        }
        if self.json {
            Ok(())
        } else {
            print(format_args!("{samples} samples in {} shards, {problems} problems", shards.len()))
        }
    }
}

impl VerifyArguments {
    fn run(self) -> Result<()> {
        let set = self.set.open()?;
        let clean = match self.clean {
            CleanArgument::Blip => Clean::Blip,
            CleanArgument::None => Clean::None,
        };
        let progress = Progress::new("samples read");
        let report = verify(&set, clean, |done, all| progress.tell(done, all));
        drop(progress);
        if self.json {
            print_json(&report)?;
        } else {
            for problem in &report.problems {
                print(problem)?;
            }
            print(format_args!(
                "{} good samples in {} shards, {} problems",
                report.good,
                report.shards,
                report.problems.len()
            ))?;
        }
        match report.problems.len() {
            0 => Ok(()),
            problems => bail!("{problems} problems found; training leaves such samples out"),
        }
    }
}

impl StatsArguments {
    fn run(self) -> Result<()> {
        let set = self.set.open()?;
        let progress = Progress::new("samples read");
        let stats = stats(&set, |done, all| progress.tell(done, all));
        drop(progress);
        if self.json { print_json(&stats) } else { print(table(&stats)) }
    }
}

fn table(stats: &Stats) -> String {
    let formats: Vec<String> = stats.formats.iter().map(|(format, count)| format!("{count} {format}")).collect();
    let mib = stats.bytes as f64 / f64::from(1 << 20);
    let mut text = format!(
        "{} samples in {} shards, {mib:.1} MiB; {} problems, {} unreadable\nformats: {}\n{:16}{:>10}{:>10}{:>10}{:>10}{:>12}",
        stats.samples,
        stats.shards,
        stats.problems,
        stats.unreadable,
        formats.join(", "),
        "",
        "min",
        "median",
        "p95",
        "max",
        "mean"
    );
    let rows = [
        ("image width", &stats.width),
        ("image height", &stats.height),
        ("image bytes", &stats.image_bytes),
        ("caption words", &stats.caption_words),
    ];
    for (name, Summary { min, median, p95, max, mean }) in rows {
        text += &format!("\n{name:16}{min:>10}{median:>10}{p95:>10}{max:>10}{mean:>12.1}");
    }
    text
}
