//! `generate`: captions for images.

use std::path::{Path, PathBuf};

use anyhow::Result;
use blip2_trainer::captioner::{Caption, CaptionOptions, Captioner, Decoding};
use blip2_trainer::evaluation::one_line;
use clap::Args;
use serde::Serialize;

use crate::arguments::{DeviceArgument, EarlyStopping, Precision, finite, positive, probability};
use crate::hub;
use crate::output::{UsageError, print, print_json, say};

const EXAMPLES: &str = "\
Examples:
  blip2 generate --model model --image cat.jpg dog.png
  blip2 generate --model model --image photos/*.jpg --num-beams 5 --json > captions.jsonl
  blip2 generate --model model --image cat.jpg --prompt 'Question: what is this? Answer:'
  blip2 generate --model model --image cat.jpg --top-p 0.9 --temperature 0.8 --seed 1

The likeliest token is taken at each step unless --num-beams asks for beam search, or --top-k, --top-p, --temperature or --seed for
sampling.";

/// Caption images with an exported stage-2 model
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct GenerateArguments {
    /// Hugging Face directory of a stage-2 model, or its hub id as hf://ORG/NAME
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Images: JPEG, PNG or WebP
    #[arg(long = "image", value_name = "FILE", num_args = 1.., required = true)]
    images: Vec<PathBuf>,
    /// Text that the caption continues or answers; once for all images, or once for each
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// Texts that beam search keeps; 1 is greedy
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    num_beams: u16,
    /// At most so many new tokens
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// No end before so many new tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_new_tokens: u32,
    /// Beam search divides a text's score by its length to this power
    #[arg(long, value_name = "F", default_value_t = 1.0, value_parser = finite, allow_negative_numbers = true)]
    length_penalty: f64,
    /// When beam search ends before the length limit, as in transformers
    #[arg(long, value_name = "WHEN", default_value = "false")]
    early_stopping: EarlyStopping,
    /// Sample among so many of the likeliest tokens [default when sampling: no such limit, where transformers has 50]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    top_k: Option<u32>,
    /// Sample among the likeliest tokens that have this probability together [default when sampling: 0.9]
    #[arg(long, value_name = "F", value_parser = probability)]
    top_p: Option<f64>,
    /// Sample with logits divided by this [default when sampling: 1]
    #[arg(long, value_name = "F", value_parser = positive)]
    temperature: Option<f64>,
    /// Decides what is sampled [default when sampling: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Storage of the frozen weights; left out, the model's own, or fp32 on a processor without instructions for that
    #[arg(long, value_name = "FORMAT")]
    precision: Option<Precision>,
    #[command(flatten)]
    device: DeviceArgument,
    /// Print {"image", "ids", "text"} as a line of JSON for each image
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    image: &'a Path,
    ids: &'a [i64],
    text: &'a str,
}

impl GenerateArguments {
    pub(crate) fn run(self) -> Result<()> {
        let options = self.options()?;
        if self.prompts.len() > 1 && self.prompts.len() != self.images.len() {
            let (prompts, images) = (self.prompts.len(), self.images.len());
            return Err(UsageError(format!(
                "--prompt: expected one, or one for each of {images} images, got {prompts}"
            ))
            .into());
        }
        let model = hub::from_environment()?.model(&self.model)?;
        let captioner = Captioner::open(&model, self.device.select()?, self.precision.map(Into::into))?;
        for batch in captioner.caption(&self.images, &self.prompts, &options)? {
            for caption in batch? {
                self.print(&caption)?;
            }
        }
        if captioner.preprocessing().file.is_none() {
            say(&format!("warning: {}: {}", model.display(), captioner.preprocessing().origin()));
        }
        Ok(())
    }

    fn options(&self) -> Result<CaptionOptions> {
        let samples = self.top_k.is_some() || self.top_p.is_some() || self.temperature.is_some() || self.seed.is_some();
        let decoding = match (samples, self.num_beams) {
            (true, 1) => Decoding::Nucleus {
                top_k: self.top_k.map(|top_k| top_k as usize),
                top_p: self.top_p.unwrap_or(0.9),
                temperature: self.temperature.unwrap_or(1.0),
                seed: self.seed.unwrap_or(0),
            },
            (true, beams) => {
                let message =
                    format!("--num-beams {beams}: expected no --top-k, --top-p, --temperature or --seed beside it");
                return Err(UsageError(message).into());
            }
            (false, 1) => Decoding::Greedy,
            (false, beams) => Decoding::Beam {
                beams: beams.into(),
                length_penalty: self.length_penalty,
                early_stopping: self.early_stopping.into(),
            },
        };
        if self.min_new_tokens > self.max_new_tokens {
            let (min, max) = (self.min_new_tokens, self.max_new_tokens);
            return Err(
                UsageError(format!("--min-new-tokens: expected at most --max-new-tokens ({max}), got {min}")).into()
            );
        }
        Ok(CaptionOptions {
            max_new_tokens: self.max_new_tokens as usize,
            min_new_tokens: self.min_new_tokens as usize,
            decoding,
        })
    }

    fn print(&self, caption: &Caption) -> Result<()> {
        let Caption { image, ids, text } = caption;
        if self.json {
            return print_json(&Line { image, ids, text });
        }
        // One image, one line, whatever the model says.
        print(format_args!("{}: {}", image.display(), one_line(text)))
    }
}
