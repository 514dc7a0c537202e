//! A thousand million pairs in 100,003 shards: what opening their manifest, starting and seeking their order cost.
//!
//! `cargo run --release -p blip2-data --example order_scale`

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::time::Instant;

use blip2_data::{Dataset, Digest, OpenOptions, Order};

// No multiple of the hosts, so that lanes meet inside shards.
const SHARDS: usize = 100_003;
const PAIRS: u64 = 10_000;
const POSITIONS: u64 = 1_000_000;
const HOSTS: usize = 8;
const GLOBAL_BATCH: usize = 1680;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let manifest = folder.path().join("manifest.jsonl");
    write_manifest(&manifest)?;
    println!("manifest: {:.1} MiB; {}", fs::metadata(&manifest)?.len() as f64 / f64::from(1 << 20), memory()?);

    let begin = Instant::now();
    let dataset = Dataset::open(&[manifest.to_string_lossy().into_owned()], &OpenOptions::default())?;
    println!(
        "open {SHARDS} shards with {} pairs: {:.3} s; {}",
        dataset.len(),
        begin.elapsed().as_secs_f64(),
        memory()?
    );

    for lanes in [1, HOSTS] {
        let begin = Instant::now();
        let order = Order::new(&dataset.counts(), 7, lanes, GLOBAL_BATCH, 8)?;
        let first = order.locate(0).index;
        println!("lanes {lanes}: start: {:.1} ms (the first sample is {first})", begin.elapsed().as_secs_f64() * 1e3);
        for position in [123_456_789_012, 999_999_999_999_999] {
            let begin = Instant::now();
            order.locate(position);
            println!("lanes {lanes}: seek to {position}: {:.1} ms", begin.elapsed().as_secs_f64() * 1e3);
        }
        let (begin, mut sum) = (Instant::now(), 0u64);
        for position in 0..POSITIONS {
            sum = sum.wrapping_add(order.locate(position).index);
        }
        let each = begin.elapsed().as_secs_f64() * 1e9 / POSITIONS as f64;
        println!("lanes {lanes}: {POSITIONS} positions: {each:.0} ns each (sum of indices {sum}); {}", memory()?);
    }

    let order = Order::new(&dataset.counts(), 7, HOSTS, GLOBAL_BATCH, 8)?;
    let mut hosts_of: HashMap<usize, u32> = HashMap::new();
    for host in 0..HOSTS {
        let slots = (host * GLOBAL_BATCH / HOSTS) as u64..((host + 1) * GLOBAL_BATCH / HOSTS) as u64;
        let batches = dataset.len() / GLOBAL_BATCH as u64;
        let mut shards = order.shards_ahead(0, batches as usize, &slots);
        // The list ends with the next epoch's first window, which does not count here.
        let behind = order.shards_ahead((batches + 2) * GLOBAL_BATCH as u64, 1, &slots);
        while shards.last().is_some_and(|shard| behind[..8].contains(shard)) {
            shards.pop();
        }
        shards.into_iter().for_each(|shard| *hosts_of.entry(shard).or_default() += 1);
    }
    let twice = hosts_of.values().filter(|&&hosts| hosts > 1).count();
    println!(
        "{HOSTS} hosts, {HOSTS} lanes: {twice} of {} shards are fetched by more than one host in an epoch",
        hosts_of.len()
    );
    Ok(())
}

/// A manifest as `blip2 shards index --manifest` writes it, of shards that need not be there.
fn write_manifest(path: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let mut body = Vec::new();
    for shard in 0..SHARDS {
        let digest = Digest::of(&shard.to_le_bytes());
        let etag = r#""\"9e107d9d372bb6826bd81d3542a419d6\"""#;
        writeln!(
            body,
            r#"{{"shard":"{shard:06}.tar","bytes":1073741824,"samples":{PAIRS},"problems":0,"index":"{digest}","contents":"{digest}","etag":{etag}}}"#
        )?;
    }
    let mut file = BufWriter::new(File::create(path)?);
    writeln!(
        file,
        r#"{{"format":"blip2-manifest","version":1,"shards":{SHARDS},"samples":{},"digest":"{}"}}"#,
        SHARDS as u64 * PAIRS,
        Digest::of(&body)
    )?;
    file.write_all(&body)?;
    Ok(file.flush()?)
}

/// This process's memory, now and at its highest.
fn memory() -> Result<String, std::io::Error> {
    let status = fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or(" 0 kB");
        line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
    };
    Ok(format!("resident {:.0} MiB, at most {:.0} MiB", field("VmRSS:"), field("VmHWM:")))
}
