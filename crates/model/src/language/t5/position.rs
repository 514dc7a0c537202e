//! Relative positions: a learned bias for each head and bucket of distances, shared by all blocks of a stack.

use blip2_torchx::params::{Init, Scope};
use tch::{Device, Kind, Tensor};

use super::T5Config;

/// `relative_attention_bias` of a stack's first block.
#[derive(Debug)]
pub(super) struct RelativePositions {
    /// `[buckets, heads]`
    weight: Tensor,
    max_distance: i64,
    /// An encoder looks both ways and halves the buckets between them.
    bidirectional: bool,
}

impl RelativePositions {
    pub(super) fn new(scope: &Scope, c: &T5Config, bidirectional: bool) -> RelativePositions {
        let table = [c.relative_attention_num_buckets, c.num_heads];
        RelativePositions {
            weight: scope.pp("relative_attention_bias").param("weight", &table, Init::Normal(0.02)),
            max_distance: c.relative_attention_max_distance,
            bidirectional,
        }
    }

    /// What is added to the scores of rows `first..total` against all `total` rows: `[1, heads, total - first, total]`.
    pub(super) fn bias(&self, first: i64, total: i64) -> Tensor {
        let buckets = self.buckets(first, total, self.weight.device());
        Tensor::embedding(&self.weight, &buckets, -1, false, false).permute([2, 0, 1]).unsqueeze(0)
    }

    /// The bucket of each distance, `i64 [total - first, total]`: near distances have one each, far ones share them by their logarithm.
    fn buckets(&self, first: i64, total: i64, device: Device) -> Tensor {
        let position = |from, to| Tensor::arange_start(from, to, (Kind::Int64, device));
        let distance = position(0, total).unsqueeze(0) - position(first, total).unsqueeze(1);
        let (buckets, side, distance) = if self.bidirectional {
            let half = self.weight.size()[0] / 2;
            (half, distance.gt(0).to_kind(Kind::Int64) * half, distance.abs())
        } else {
            (self.weight.size()[0], distance.zeros_like(), -distance.clamp_max(0))
        };
        let exact = buckets / 2;
        // In the reference's order of operations, since the edges of the buckets lie where the logarithm is a whole number.
        let far = (distance.to_kind(Kind::Float) / exact as f64).log() / (self.max_distance as f64 / exact as f64).ln()
            * (buckets - exact) as f64;
        let far = (far.to_kind(Kind::Int64) + exact).clamp_max(buckets - 1);
        side + distance.where_self(&distance.lt(exact), &far)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn positions(bidirectional: bool) -> RelativePositions {
        let weight = Tensor::arange(32, (Kind::Float, Device::Cpu)).unsqueeze(1);
        RelativePositions { weight, max_distance: 128, bidirectional }
    }

    fn row(positions: &RelativePositions, query: i64, total: i64) -> Vec<i64> {
        Vec::try_from(positions.buckets(query, total, Device::Cpu).get(0)).unwrap()
    }

    #[test]
    fn a_decoder_has_a_bucket_for_each_near_distance_and_one_for_all_from_the_maximum_on() {
        let past = row(&positions(false), 200, 201);
        let distance = |d: usize| past[200 - d];
        assert_eq!((0..16).map(distance).collect::<Vec<_>>(), (0..16).collect::<Vec<_>>());
        assert_eq!((distance(16), distance(127), distance(128), distance(200)), (16, 31, 31, 31));
        assert!(past.windows(2).all(|pair| pair[0] >= pair[1]), "{past:?}");
    }

    #[test]
    fn an_encoder_tells_before_from_behind() {
        let both = row(&positions(true), 100, 201);
        assert_eq!((both[100], both[99], both[101], both[0], both[200]), (0, 1, 17, 15, 31));
    }

    #[test]
    fn later_rows_are_the_last_rows_of_all() {
        for bidirectional in [false, true] {
            let positions = positions(bidirectional);
            assert!(positions.bias(0, 40).narrow(2, 30, 10).equal(&positions.bias(30, 40)));
        }
    }
}
