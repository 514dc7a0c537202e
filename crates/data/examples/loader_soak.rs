//! Hands out many batches of tiny images and fails when the resident memory grows.
//!
//!   cargo run --release -p blip2-data --example loader_soak -- [STEPS]      100,000 steps by default
//!
//! Some of the images are damaged, so that the way of bad samples is walked too. Linux only: it reads /proc.

#[path = "../tests/fixture/mod.rs"]
mod fixture;

use std::error::Error;
use std::time::Instant;
use std::{env, fs};

use blip2_data::{Loader, LoaderOptions};

/// Samples of the memory over the run.
const READINGS: u64 = 20;
/// The readings behind the first quarter may differ by this much.
const SLACK_KIB: u64 = 1024;

fn main() -> Result<(), Box<dyn Error>> {
    let steps: u64 = env::args().nth(1).map_or(Ok(100_000), |steps| steps.parse())?;
    if steps < READINGS {
        return Err(format!("expected at least {READINGS} steps, got {steps}").into());
    }
    let folder = fixture::shards(&[64, 64, 64, 64], |index| index % 50 == 7);
    let options = LoaderOptions { max_bad_fraction: 1.0, image_size: 16, ..fixture::loader_options() };
    let mut loader = Loader::new(fixture::corpus(folder.path()), fixture::text(), options)?;
    let begin = Instant::now();
    let mut readings = Vec::new();
    for step in 1..=steps {
        let batch = loader.next_batch()?;
        loader.take_quarantined();
        if step % (steps / READINGS) == 0 {
            let resident = resident_kib()?;
            println!("step {step}, epoch {}: {resident} KiB, {:.0} s", batch.epoch, begin.elapsed().as_secs_f64());
            readings.push(resident);
        }
    }
    let late = &readings[readings.len() / 4..];
    let (least, most) = (late.iter().min().unwrap_or(&0), late.iter().max().unwrap_or(&0));
    println!("{steps} steps, {} bad samples: {least} to {most} KiB behind the first quarter", loader.bad().len());
    if most - least > SLACK_KIB {
        return Err(format!("memory grew by {} KiB, more than {SLACK_KIB}", most - least).into());
    }
    Ok(())
}

fn resident_kib() -> Result<u64, Box<dyn Error>> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS in /proc/self/status")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}
