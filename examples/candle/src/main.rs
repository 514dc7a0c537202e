//! Captions pictures with a model that `blip2 export` wrote, computed by candle: no libtorch, no Python.

mod attention;
mod captioner;
mod language;
mod llama;
mod model_dir;
mod picture;
mod qformer;
mod t5;
mod vision;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser;

use captioner::Captioner;
use language::Limits;

/// Captions pictures with an exported BLIP-2 model; prints {"image", "ids", "text"} as a line of JSON for each.
#[derive(Parser)]
#[command(name = "caption", version)]
struct Arguments {
    /// Directory that `blip2 export` wrote
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Images: JPEG, PNG or WebP
    #[arg(long = "image", value_name = "FILE", num_args = 1.., required = true)]
    images: Vec<PathBuf>,
    /// Text that the caption continues; once for all images, or once for each
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// At most so many new tokens
    #[arg(long, value_name = "N", default_value_t = 30)]
    max_new_tokens: usize,
    /// No end before so many new tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_new_tokens: usize,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    let images = arguments.images.len();
    let prompts = match arguments.prompts.as_slice() {
        [] => vec![String::new(); images],
        [one] => vec![one.clone(); images],
        each if each.len() == images => each.to_vec(),
        several => bail!("--prompt: expected one, or one for each of {images} images, got {}", several.len()),
    };
    let captioner = Captioner::load(&arguments.model)?;
    let limits = Limits {
        max_new_tokens: arguments.max_new_tokens,
        min_new_tokens: arguments.min_new_tokens,
        eos: captioner.eos.clone(),
    };
    for (image, prompt) in arguments.images.iter().zip(&prompts) {
        println!("{}", serde_json::to_string(&captioner.caption(image, prompt, &limits)?)?);
    }
    Ok(())
}
