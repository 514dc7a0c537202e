//! A pass of the trunk: which rows there are and who attends to whom.

use tch::{Kind, Tensor};

use super::text::TextBatch;
use crate::dropout::{Dropout, RowKeys};

/// Rows of one kind, `count` a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// Query rows.
    Queries,
    /// Text rows.
    Text,
}

/// One attention: the rows of some segments attend to the rows of some segments.
#[derive(Debug)]
pub struct Block {
    /// Segments whose rows ask.
    pub rows: Vec<usize>,
    /// Segments whose rows answer, in this order along the key axis.
    pub columns: Vec<usize>,
    /// Boolean, true = may attend, broadcasting to `[B, heads, rows, columns]`; absent: all may.
    pub mask: Option<Tensor>,
    pub(crate) sample_keys: RowKeys,
}

/// The rows of a pass, `[segment 0 of all samples | segment 1 of all samples | ..]`, and its attentions.
#[derive(Debug)]
pub struct Pass<'a> {
    /// Samples (or pairs).
    pub batch: i64,
    /// Segments in the order of rows, with rows a sample.
    pub segments: Vec<(Segment, i64)>,
    /// Attentions; every segment asks in exactly one.
    pub blocks: Vec<Block>,
    /// The dropout of this pass.
    pub dropout: &'a Dropout,
    row_keys: Vec<RowKeys>,
    all_keys: RowKeys,
}

impl<'a> Pass<'a> {
    /// Queries alone.
    pub fn queries(batch: i64, queries: i64, dropout: &'a Dropout) -> Pass<'a> {
        Pass::new(batch, vec![(Segment::Queries, queries)], vec![(vec![0], vec![0], None)], dropout, 0)
    }

    /// Text alone, bidirectional up to its padding.
    pub fn text(text: &TextBatch, dropout: &'a Dropout) -> Pass<'a> {
        let mask = text.mask.unsqueeze(1).unsqueeze(1); // [B, 1, 1, T]
        let segments = vec![(Segment::Text, text.tokens())];
        Pass::new(text.batch(), segments, vec![(vec![0], vec![0], Some(mask))], dropout, 1)
    }

    /// What LAVIS computes in three passes (image, text, generation), since queries never see text here:
    ///
    /// ```text
    ///               queries   text [CLS]   text [DEC]
    ///   queries     all       .            .
    ///   text [CLS]  .         all*         .
    ///   text [DEC]  all       .            causal*        * up to the padding
    /// ```
    pub fn packed(queries: i64, text: &TextBatch, dropout: &'a Dropout) -> Pass<'a> {
        let (batch, tokens, device) = (text.batch(), text.tokens(), text.ids.device());
        let padding = text.mask.unsqueeze(1).unsqueeze(1); // [B, 1, 1, T]
        let causal = Tensor::ones([tokens, tokens], (Kind::Bool, device)).tril(0);
        let causal = padding.logical_and(&causal); // [B, 1, T, T]
        let prefix = Tensor::ones([batch, 1, tokens, queries], (Kind::Bool, device));
        let generation = Tensor::cat(&[prefix, causal], -1);
        let segments = vec![(Segment::Queries, queries), (Segment::Text, tokens), (Segment::Text, tokens)];
        let blocks =
            vec![(vec![0], vec![0], None), (vec![1], vec![1], Some(padding)), (vec![2], vec![0, 2], Some(generation))];
        Pass::new(batch, segments, blocks, dropout, 2)
    }

    /// Image-text matching: both see both.
    ///
    /// ```text
    ///             queries   text
    ///   queries   all       all*
    ///   text      all       all*      * up to the padding
    /// ```
    pub fn pairs(queries: i64, text: &TextBatch, dropout: &'a Dropout) -> Pass<'a> {
        let (batch, device) = (text.batch(), text.ids.device());
        let mask = Tensor::cat(&[Tensor::ones([batch, queries], (Kind::Bool, device)), text.mask.copy()], 1);
        let mask = mask.unsqueeze(1).unsqueeze(1); // [P, 1, 1, queries + T]
        let segments = vec![(Segment::Queries, queries), (Segment::Text, text.tokens())];
        Pass::new(batch, segments, vec![(vec![0, 1], vec![0, 1], Some(mask))], dropout, 8)
    }

    fn new(
        batch: i64,
        segments: Vec<(Segment, i64)>,
        blocks: Vec<(Vec<usize>, Vec<usize>, Option<Tensor>)>,
        dropout: &'a Dropout,
        first_segment: i64,
    ) -> Pass<'a> {
        let row_keys: Vec<RowKeys> =
            segments.iter().enumerate().map(|(i, s)| dropout.token_keys(first_segment + i as i64, s.1)).collect();
        let all_keys = RowKeys::concat(&row_keys.iter().collect::<Vec<_>>());
        let blocks = blocks
            .into_iter()
            .map(|(rows, columns, mask)| {
                let sample_keys = dropout.sample_keys(first_segment + rows[0] as i64, 0, batch);
                Block { rows, columns, mask, sample_keys }
            })
            .collect();
        Pass { batch, segments, blocks, dropout, row_keys, all_keys }
    }

    /// Rows of each segment over all samples.
    pub fn segment_rows(&self) -> Vec<i64> {
        self.segments.iter().map(|(_, rows)| rows * self.batch).collect()
    }

    /// Rows of all query segments (they come first) and of all text segments.
    pub fn query_and_text_rows(&self) -> (i64, i64) {
        let rows = |kind| self.segments.iter().filter(|s| s.0 == kind).map(|s| s.1 * self.batch).sum();
        (rows(Segment::Queries), rows(Segment::Text))
    }

    /// Whether only query rows are read behind the last layer: passes over pairs, where text has done its work by attending.
    pub fn reads_queries_only(&self) -> bool {
        self.segments.len() == 2
    }

    /// Dropout keys of all rows.
    pub(crate) fn row_keys(&self) -> &RowKeys {
        &self.all_keys
    }

    /// Dropout keys of the query rows.
    pub(crate) fn query_keys(&self) -> &RowKeys {
        &self.row_keys[0]
    }

    /// Dropout keys of the text rows.
    pub(crate) fn text_keys(&self) -> RowKeys {
        let first = self.segments.iter().position(|s| !s.0.is_queries()).unwrap_or(self.segments.len());
        RowKeys::concat(&self.row_keys[first..].iter().collect::<Vec<_>>())
    }
}
