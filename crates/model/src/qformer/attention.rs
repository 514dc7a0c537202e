//! The Q-Former's two attentions: self-attention over segments, cross-attention from queries to images.

use blip2_torchx::params::Scope;
use tch::Tensor;

use super::image_keys::{Group, PairKeysLayer};
use super::pass::{Block, Pass};
use crate::layers::{Linear, merge_heads, split_heads};

/// The dropout segment of cross-attention maps, which no segment of rows uses.
const CROSS_ATTENTION_SEGMENT: i64 = 16;

/// Query, key and value projections; `attention.attention` and `crossattention.attention` in the names.
#[derive(Debug)]
pub struct Projections {
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    heads: i64,
}

impl Projections {
    pub fn new(scope: &Scope, hidden: i64, key_width: i64, heads: i64) -> Projections {
        Projections {
            query: Linear::bert(&scope.pp("query"), hidden, hidden),
            key: Linear::bert(&scope.pp("key"), key_width, hidden),
            value: Linear::bert(&scope.pp("value"), key_width, hidden),
            heads,
        }
    }

    /// Self-attention of a pass: `x [R, hidden] -> [R, hidden]`; with `queries_only`, of the query rows alone `[B * queries, hidden]`.
    pub fn self_attention(&self, x: &Tensor, pass: &Pass, queries_only: bool) -> Tensor {
        let asking = if queries_only { x.narrow(0, 0, pass.segment_rows()[0]) } else { x.shallow_clone() };
        let asking_segments = if queries_only { 1 } else { pass.segments.len() };
        let q = segments(&self.query.forward(&asking), pass, asking_segments);
        let k = segments(&self.key.forward(x), pass, pass.segments.len());
        let v = segments(&self.value.forward(x), pass, pass.segments.len());
        let mut outputs: Vec<Option<Tensor>> = (0..asking_segments).map(|_| None).collect();
        for block in &pass.blocks {
            let rows: Vec<usize> = block.rows.iter().copied().filter(|&s| s < asking_segments).collect();
            if rows.is_empty() {
                continue;
            }
            self.block(block, &rows, [&q, &k, &v], pass, &mut outputs);
        }
        let outputs: Vec<Tensor> = outputs.into_iter().flatten().map(|o| o.flatten(0, 1)).collect();
        if outputs.len() == 1 { outputs[0].shallow_clone() } else { Tensor::cat(&outputs, 0) }
    }

    fn block(
        &self,
        block: &Block,
        rows: &[usize],
        [q, k, v]: [&[Tensor]; 3],
        pass: &Pass,
        outputs: &mut [Option<Tensor>],
    ) {
        let heads = |parts: &[Tensor], which: &[usize]| split_heads(&join(parts, which), self.heads);
        let (q, k, v) = (heads(q, rows), heads(k, &block.columns), heads(v, &block.columns));
        let attended = merge_heads(&pass.dropout.attend(&q, &k, &v, block.mask.as_ref(), &block.sample_keys));
        let sizes: Vec<i64> = rows.iter().map(|&s| pass.segments[s].1).collect();
        let parts = if rows.len() == 1 { vec![attended] } else { attended.split_with_sizes(sizes, 1) };
        for (&segment, part) in rows.iter().zip(parts) {
            outputs[segment] = Some(part);
        }
    }

    /// Cross-attention of query rows `[P * queries, hidden]` to the images of their pairs.
    pub fn cross_attention(&self, x: &Tensor, pass: &Pass, keys: &PairKeysLayer) -> Tensor {
        let queries = pass.segments[0].1;
        let q = self.query.forward(x);
        let sizes: Vec<i64> = keys.groups.iter().map(|g| g.pairs() * queries).collect();
        let parts = if sizes.len() == 1 { vec![q] } else { q.split_with_sizes(sizes, 0) };
        let outputs: Vec<Tensor> =
            parts.iter().zip(&keys.groups).map(|(q, group)| self.group(q, group, queries, pass)).collect();
        if outputs.len() == 1 { outputs[0].shallow_clone() } else { Tensor::cat(&outputs, 0) }
    }

    /// One group: `repeats` consecutive pairs' worth of queries share each image, so its keys are read once for all of them.
    fn group(&self, q: &Tensor, group: &Group, queries: i64, pass: &Pass) -> Tensor {
        let (images, repeats) = (group.images, group.repeats);
        let size = q.size()[1] / self.heads;
        // [repeats, images, queries, heads, size] -> [images, heads, repeats * queries, size]
        let q = q.view([repeats, images, queries, self.heads, size]).permute([1, 3, 0, 2, 4]);
        let q = q.reshape([images, self.heads, repeats * queries, size]);
        let sample_keys = pass.dropout.sample_keys(CROSS_ATTENTION_SEGMENT, group.first_pair, images);
        let attended = pass.dropout.attend(&q, &group.key, &group.value, None, &sample_keys);
        let attended = attended.view([images, self.heads, repeats, queries, size]).permute([2, 0, 3, 1, 4]);
        attended.reshape([repeats * images * queries, self.heads * size])
    }
}

/// Cuts flat rows `[R, hidden]` into its first `count` segments `[B, rows, hidden]`.
fn segments(x: &Tensor, pass: &Pass, count: usize) -> Vec<Tensor> {
    let sizes = &pass.segment_rows()[..count];
    let parts = if count == 1 { vec![x.shallow_clone()] } else { x.split_with_sizes(sizes, 0) };
    parts.iter().zip(&pass.segments).map(|(part, &(_, rows))| part.view([pass.batch, rows, -1])).collect()
}

/// Segments side by side along the row axis.
fn join(parts: &[Tensor], which: &[usize]) -> Tensor {
    match which {
        [one] => parts[*one].shallow_clone(),
        many => Tensor::cat(&many.iter().map(|&i| &parts[i]).collect::<Vec<_>>(), 1),
    }
}
