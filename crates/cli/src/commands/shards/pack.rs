//! `shards pack`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use blip2_trainer::shards::{Keep, PackOptions, Reading, Reencode, SourceFormat, pack};
use clap::{Args, ValueEnum};

use crate::output::{print, print_json, say};
use crate::progress::Progress;

const PACK_EXAMPLES: &str = "\
Examples:
  blip2 shards pack --captions photos/captions.jsonl --out shards
  blip2 shards pack --captions pairs.csv --images photos --image-field file_name --caption-field text --out shards
  blip2 shards pack --source cc3m --out shards --longest-side 512
  blip2 shards pack --source annotations/captions_train2017.json --images train2017 --out shards
  blip2 shards pack --source region_descriptions.json --images . --out shards
  blip2 shards pack --source 'data/train-*.parquet' --caption-field text --keep-field url --out shards

What --source may be (--format auto tells them apart):
  captions       .jsonl with an object a line, as {\"image\": \"cat.jpg\", \"caption\": \"a cat\"}; .csv with a header; .tsv with a header or
                 two columns, image and caption; .json with a list of objects. A caption may be a list of captions
  img2dataset    a folder of KEY.jpg, KEY.txt and KEY.json at any depth: img2dataset's format files, or pictures with texts beside them
  coco           COCO captions: images and annotations in one .json
  visual-genome  region_descriptions.json; the regions' phrases are the image's captions
  parquet        a Hugging Face dataset: an image column of bytes and path, a column of text or of lists of texts

Image paths start at --images, else at the file that names them. Every image is decoded once; rows that cannot be used are left out and
listed in OUT/left_out.jsonl. Of several captions the first becomes KEY.txt, all of them a list \"captions\" in KEY.json, where the kept
fields go too. Killed at any moment, the same command goes on behind the last whole shard and ends with the same bytes.";

/// Pack images and captions into shards with indices
#[derive(Args)]
#[command(after_help = PACK_EXAMPLES)]
pub(crate) struct PackArguments {
    #[command(flatten)]
    packed: PackedArguments,
    /// Folder that gets the shards
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

// What a command packs, and how.
#[derive(Args)]
pub(crate) struct PackedArguments {
    /// What is packed: a file, a folder, or a pattern of files
    #[arg(long, value_name = "PATH", required_unless_present = "captions", conflicts_with = "captions")]
    source: Option<PathBuf>,
    /// How the source is laid out
    #[arg(long, value_name = "FORMAT", default_value = "auto", conflicts_with = "captions")]
    format: FormatArgument,
    /// The captions file: --source with --format captions
    #[arg(long, value_name = "FILE")]
    captions: Option<PathBuf>,
    /// Folder where the image paths start; left out, that of the file that names them
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Samples a shard
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    shard_samples: u32,
    /// Field or column of the image or its path [default: image; coco: file_name]
    #[arg(long, value_name = "NAME")]
    image_field: Option<String>,
    /// Field or column of the caption [default: caption]
    #[arg(long, value_name = "NAME")]
    caption_field: Option<String>,
    /// Keep a further field or column in KEY.json; may be given several times
    #[arg(long, value_name = "NAME")]
    keep_field: Vec<String>,
    /// Keep all fields or columns in KEY.json
    #[arg(long, conflicts_with = "keep_field")]
    keep_all: bool,
    /// Shrink larger images to this many pixels and write them as JPEG; the others stay byte for byte
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    longest_side: Option<u32>,
    /// Quality of these JPEGs
    #[arg(long, value_name = "Q", default_value_t = 95, requires = "longest_side", value_parser = clap::value_parser!(u8).range(1..=100))]
    quality: u8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FormatArgument {
    Auto,
    Captions,
    Img2dataset,
    Coco,
    VisualGenome,
    Parquet,
}

impl From<FormatArgument> for SourceFormat {
    fn from(format: FormatArgument) -> SourceFormat {
        match format {
            FormatArgument::Auto => SourceFormat::Auto,
            FormatArgument::Captions => SourceFormat::Captions,
            FormatArgument::Img2dataset => SourceFormat::Img2dataset,
            FormatArgument::Coco => SourceFormat::Coco,
            FormatArgument::VisualGenome => SourceFormat::VisualGenome,
            FormatArgument::Parquet => SourceFormat::Parquet,
        }
    }
}

impl PackArguments {
    pub(super) fn run(self) -> Result<()> {
        let progress = Progress::new("rows packed");
        let tell = move |done, all| progress.tell(done, all);
        let report = pack(&PackOptions { progress: Some(Arc::new(tell)), ..self.packed.options(self.out) })?;
        if self.json {
            return print_json(&report);
        }
        for problem in &report.problems {
            say(&format!("warning: left out: {}: {}", problem.place, problem.reason));
        }
        let told = report.problems.len() as u64;
        if report.left_out > told {
            say(&format!(
                "warning: {} more rows left out; left_out.jsonl beside the shards lists all",
                report.left_out - told
            ));
        }
        if report.resumed_rows > 0 {
            say(&format!("went on behind {} rows that were packed already", report.resumed_rows));
        }
        for shard in &report.shards {
            print(shard.display())?;
        }
        let (samples, shards, left_out) = (report.samples, report.shards.len(), report.left_out);
        print(format_args!("{samples} samples in {shards} shards, {left_out} rows left out"))
    }
}

impl PackedArguments {
    /// To be packed into `out`.
    pub(crate) fn options(self, out: PathBuf) -> PackOptions {
        let (source, format) = match (self.captions, self.source) {
            (Some(captions), _) => (captions, SourceFormat::Captions),
            (None, source) => (source.unwrap_or_default(), self.format.into()),
        };
        let keep = match (self.keep_all, self.keep_field.is_empty()) {
            (true, _) => Keep::All,
            (false, false) => Keep::Fields(self.keep_field),
            (false, true) => Keep::Nothing,
        };
        PackOptions {
            source,
            format,
            reading: Reading {
                images: self.images,
                image_field: self.image_field,
                caption_field: self.caption_field,
                keep,
            },
            out,
            shard_samples: self.shard_samples as usize,
            reencode: self.longest_side.map(|longest_side| Reencode { longest_side, quality: self.quality }),
            progress: None,
        }
    }
}
