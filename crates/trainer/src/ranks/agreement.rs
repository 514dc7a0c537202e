//! Ranks that were started with different files are found before the first step.

use std::fs::File;
use std::io;
use std::sync::OnceLock;

use blip2_torchx::process::libtorch_version;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{Ranks, share};
use crate::error::Error;

/// What a rank was started with, by name: each must be equal on all ranks.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Claims(Vec<(String, String)>);

impl Claims {
    /// Adds one.
    pub(crate) fn claim(&mut self, what: impl Into<String>, value: impl Into<String>) {
        self.0.push((what.into(), value.into()));
    }

    /// Adds the program, by its bytes, and the libtorch that it has loaded.
    ///
    /// # Errors
    /// A program that cannot read itself.
    pub(crate) fn claim_program(&mut self, git_commit: Option<&str>) -> Result<(), Error> {
        let commit = git_commit.unwrap_or("unknown commit");
        self.claim("program", format!("{} ({commit})", env!("CARGO_PKG_VERSION")));
        self.claim("program's BLAKE3", program_digest().map_err(|error| Error::file(PROGRAM, error))?);
        self.claim("libtorch", libtorch_version());
        Ok(())
    }

    /// Compares them over the ranks.
    ///
    /// # Errors
    /// The differences from rank 0, by rank and name.
    pub(crate) fn compare(&self, ranks: &dyn Ranks) -> Result<(), Error> {
        let differences = differences(&share(ranks, self)?);
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::Mismatch(format!(
            "ranks were started with different things: {}; give all of them the same program, configuration and files",
            differences.join("; ")
        )))
    }
}

/// Each name once, with the first rank that says something else than rank 0.
fn differences(all: &[Claims]) -> Vec<String> {
    let Some((first, others)) = all.split_first() else { return Vec::new() };
    let value = |claims: &Claims, what: &str| {
        claims.0.iter().find(|(name, _)| name == what).map_or("nothing".to_owned(), |(_, value)| value.clone())
    };
    let mut names: Vec<&String> = first.0.iter().map(|(name, _)| name).collect();
    for (name, _) in others.iter().flat_map(|claims| &claims.0) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let difference = |name: &String| {
        let expected = value(first, name);
        let other = others.iter().position(|claims| value(claims, name) != expected)?;
        Some(format!("{name}: {expected} on rank 0, {} on rank {}", value(&others[other], name), other + 1))
    };
    names.into_iter().filter_map(difference).collect()
}

/// This program's file, even where another has taken its place since.
const PROGRAM: &str = "/proc/self/exe";

fn program_digest() -> io::Result<String> {
    // It does not change while it runs.
    static DIGEST: OnceLock<String> = OnceLock::new();
    if let Some(digest) = DIGEST.get() {
        return Ok(digest.clone());
    }
    let digest = blake3::Hasher::new().update_reader(File::open(PROGRAM)?)?.finalize();
    Ok(DIGEST.get_or_init(|| digest.to_hex()[..16].to_owned()).clone())
}

/// Spreads places over 64 bits.
const PLACE_FACTOR: i64 = 0x1E37_79B9_7F4A_7C15;
/// So many values are weighed at a time: a tower has gigabytes, and these stay in the processor's cache.
const WEIGHED_AT_ONCE: i64 = 1 << 18;

/// A number that tells tensors apart whatever the order in which it is computed: sums of their values' bits, each times an odd number of its own
/// place, and each tensor's by its place.
pub(crate) fn checksum(tensors: &[Tensor]) -> u64 {
    let bits = |tensor: &Tensor| {
        let kind = match tensor.kind() {
            Kind::Float => Kind::Int,
            Kind::BFloat16 | Kind::Half => Kind::Int16,
            Kind::Double => Kind::Int64,
            other => other,
        };
        let bits = tensor.detach().contiguous().view(-1).view_dtype(kind);
        let (count, options) = (bits.size()[0], (Kind::Int64, bits.device()));
        // Odd, so that no bit of a value is lost; int64 wraps.
        let weights = Tensor::arange(WEIGHED_AT_ONCE.min(count), options) * PLACE_FACTOR * 2 + 1;
        let sums = (0..count).step_by(WEIGHED_AT_ONCE as usize).map(|from| {
            let length = WEIGHED_AT_ONCE.min(count - from);
            let part = bits.narrow(0, from, length).to_kind(Kind::Int64);
            // The weights of places further on are so much larger.
            let further = from.wrapping_mul(PLACE_FACTOR).wrapping_mul(2);
            (&part * weights.narrow(0, 0, length)).sum(Kind::Int64) + part.sum(Kind::Int64) * further
        });
        sums.fold(Tensor::zeros([], options), |sum, part| sum + part).int64_value(&[]) as u64
    };
    tensors.iter().fold(0, |sum, tensor| sum.wrapping_mul(0x0000_0100_0000_01B3).wrapping_add(bits(tensor)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(pairs: &[(&str, &str)]) -> Claims {
        let mut claims = Claims::default();
        pairs.iter().for_each(|(what, value)| claims.claim(*what, *value));
        claims
    }

    #[test]
    fn each_difference_is_named_with_a_rank() {
        let all = [
            claims(&[("seed", "1"), ("batch", "8")]),
            claims(&[("seed", "1"), ("batch", "8")]),
            claims(&[("seed", "2"), ("batch", "8"), ("more", "x")]),
        ];
        assert_eq!(differences(&all), ["seed: 1 on rank 0, 2 on rank 2", "more: nothing on rank 0, x on rank 2"]);
        assert!(differences(&all[..2]).is_empty());
    }

    #[test]
    fn a_checksum_sees_values_and_their_order() {
        let (a, b) = (Tensor::from_slice(&[1f32, 2.0]), Tensor::from_slice(&[1f32, 2.000_000_2]));
        let of = |tensors: &[&Tensor]| checksum(&tensors.iter().map(|t| t.copy()).collect::<Vec<_>>());
        assert_ne!(of(&[&a]), of(&[&b]));
        assert_ne!(of(&[&a, &b]), of(&[&b, &a]));
        assert_ne!(of(&[&Tensor::from_slice(&[2f32, 1.0])]), of(&[&a]), "rows that changed places");
        let rows = Tensor::arange(12, (Kind::BFloat16, tch::Device::Cpu)).view([3, 4]);
        assert_ne!(of(&[&rows]), of(&[&rows.flip([0])]));
        assert_eq!(of(&[&Tensor::zeros([0, 4], (Kind::Float, tch::Device::Cpu))]), 0);
        let apart = Tensor::from_slice(&[1f32, 9.0, 2.0, 9.0]).view([2, 2]).select(1, 0);
        assert_eq!(of(&[&apart, &b]), of(&[&a, &b]), "not where they lie in memory");
    }
}
