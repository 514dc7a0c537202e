//! `shards stats`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use blip2_trainer::shards::{
    DataError, Dataset, Layout, Stats, Summary, contact_sheet, encode_png, keyed_samples, stats, write_file,
};
use clap::Args;

use super::SetArguments;
use crate::output::{print, print_json, say};
use crate::progress::Progress;

/// Pictures a row of a contact sheet, the side of each and lines of text below it.
const SHEET: Layout = Layout { columns: 6, side: 192, lines: 4 };

const STATS_EXAMPLES: &str = "\
Examples:
  blip2 shards stats 'shards/*.tar'
  blip2 shards stats 'shards/{00000..00099}.tar' --json
  blip2 shards stats 'shards/*.tar' --sheet sheet.png --samples 48 --seed 1

A contact sheet shows samples that the seed chooses, with their captions: look at it before training.";

/// Count samples, formats, image sizes and caption lengths, and show some
#[derive(Args)]
#[command(after_help = STATS_EXAMPLES)]
pub(crate) struct StatsArguments {
    #[command(flatten)]
    set: SetArguments,
    /// Write a PNG with samples of the set and their captions
    #[arg(long, value_name = "FILE.png")]
    sheet: Option<PathBuf>,
    /// Samples on the sheet
    #[arg(long, value_name = "N", default_value_t = 24, requires = "sheet", value_parser = clap::value_parser!(u32).range(1..=1000))]
    samples: u32,
    /// Chooses the samples on the sheet
    #[arg(long, value_name = "N", default_value_t = 0, requires = "sheet")]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl StatsArguments {
    pub(super) fn run(self) -> Result<()> {
        let set = self.set.open()?;
        // First the sheet: a place that cannot be written should not be found after hours.
        if let Some(path) = &self.sheet {
            self.draw(&set, path)?;
        }
        let progress = Progress::new("samples read");
        let stats = stats(&set, |done, all| progress.tell(done, all))?;
        drop(progress);
        if self.json { print_json(&stats) } else { print(table(&stats)) }
    }

    fn draw(&self, set: &Dataset, path: &Path) -> Result<()> {
        let cells = keyed_samples(set, self.samples as usize, self.seed)?;
        let png = encode_png(&contact_sheet(&cells, SHEET))?;
        write_file(path, &png).map_err(|source| DataError::Io { path: path.to_owned(), source })?;
        say(&format!("contact sheet of {} samples: {}", cells.len(), path.display()));
        Ok(())
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
        ("width/height %", &stats.aspect_percent),
        ("image bytes", &stats.image_bytes),
        ("caption words", &stats.caption_words),
    ];
    for (name, Summary { min, median, p95, max, mean }) in rows {
        text += &format!("\n{name:16}{min:>10}{median:>10}{p95:>10}{max:>10}{mean:>12.1}");
    }
    text
}
