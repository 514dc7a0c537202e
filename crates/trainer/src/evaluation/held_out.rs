//! Held-out measurements: the stream of batches that a task's evaluation reads, and what it reports.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use blip2_data::feature_store::Writer;
use blip2_data::{
    Cell, Clean, Corpus, EvalFeatures, EvalOptions, EvalReader, Filter, HostBatch, Layout, Pick, Problem, Quarantined,
    encode_png,
};
use blip2_metrics::{Recall, recall_at};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::assembly::Assembly;
use crate::assembly::blueprint::Blueprint;
use crate::assembly::preprocessing::Preprocessing;
use crate::config::{Config, FeatureCache};
use crate::data::batch::{Batch, Share};
use crate::data::text::TextFrame;
use crate::error::Error;
use crate::features::Features;
use crate::features::disk::DiskFeatures;
use crate::features::encoder::ImageEncoder;
use crate::features::memory::{FillOptions, MemoryCaches};
use crate::ranks::{self, Ranks};
use crate::run::signals::StopSignal;
use crate::task::TargetRule;

/// Recall is measured at these ranks.
pub const RECALL_RANKS: [usize; 3] = [1, 5, 10];

/// A held-out set with all that turns it into batches.
pub struct HeldOutSet {
    corpus: Arc<Corpus>,
    features: Features,
    batch: usize,
    threads: usize,
    image_size: usize,
    filter: Filter,
    clean: Clean,
    seed: u64,
    /// Samples that a pass has named as unreadable.
    named: RefCell<BTreeSet<u64>>,
    /// How many sample captions are wanted.
    pub captions: usize,
    /// Whether retrieval is measured.
    pub retrieval: bool,
    /// How many candidates of each query are re-ranked by ITM; 0: none.
    pub rerank: usize,
}

/// Hears how far an evaluation is: what is counted, how many are done, of how many.
pub type Tell<'a> = &'a dyn Fn(&'static str, u64, u64);

/// One pass over the held-out set.
pub struct HeldOut<'a> {
    reader: EvalReader,
    encoder: &'a ImageEncoder,
    text: &'a TextFrame,
    rule: TargetRule,
    set: &'a HeldOutSet,
    ranks: &'a dyn Ranks,
    images: u64,
    done: u64,
    tell: Tell<'a>,
    stop: Option<&'a StopSignal>,
    cut_short: bool,
}

/// What was measured.
#[derive(Debug, Default)]
pub struct Evaluation {
    /// Named values: `val_loss`, `val_loss_itc`, .., `retrieval_r1`, ...
    pub scalars: Vec<(String, f64)>,
    /// Recall in both directions, where retrieval was measured.
    pub recall: Vec<Recall>,
    /// The same behind re-ranking, where that was asked for.
    pub reranked: Vec<Recall>,
    /// Held-out samples.
    pub samples: usize,
    /// Different images among them, where retrieval was measured.
    pub images: usize,
    /// Sample texts beside the truth: captions, or what was retrieved.
    pub texts: Vec<SampleText>,
}

/// A held-out picture's text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SampleText {
    /// The picture's index in the set.
    pub index: u64,
    /// Its caption.
    pub truth: String,
    /// What the model says of it.
    pub said: String,
}

impl HeldOutSet {
    /// Makes sure, before a model is loaded, that a sample of open shards can be read.
    ///
    /// # Errors
    /// When none can.
    pub fn check(config: &Config, corpus: &Arc<Corpus>, blueprint: &Blueprint) -> Result<(), Error> {
        let set = HeldOutSet::encoding(corpus.clone(), config, &blueprint.preprocessing);
        let mut reader = set.reader(blueprint.text(), 0..set.corpus.len(), true, None)?;
        if reader.next().transpose()?.is_some() {
            return Ok(());
        }
        let first = reader.take_quarantined().first().map(ToString::to_string).unwrap_or_default();
        let all = set.corpus.len();
        Err(Error::Mismatch(format!("data.val: none of the {all} samples can be read; the first: {first}")))
    }

    /// Makes the held-out set of open shards and fills its memory cache where the run has one. `writer` stores its features in a cache on disk.
    ///
    /// # Errors
    /// When the shards cannot be read, or the cache on disk cannot be used.
    pub fn open(
        config: &Config,
        corpus: &Arc<Corpus>,
        assembly: &Assembly,
        ranks: &dyn Ranks,
        caches: &mut MemoryCaches,
        writer: Writer,
    ) -> Result<HeldOutSet, Error> {
        let Assembly { encoder, text, .. } = assembly;
        let mut set = HeldOutSet::of(corpus.clone(), config, encoder, writer)?;
        if config.data.feature_cache == FeatureCache::Memory {
            let options = FillOptions { threads: set.threads, clean: set.clean };
            let said = &mut |done, _| ranks.enter(done, "held-out image features");
            set.features =
                Features::Memory(caches.get_or_fill(&set.corpus, &text.encoder, encoder, &options, ranks, said)?);
        }
        Ok(set)
    }

    /// The set, its features computed in every pass unless they are kept on disk.
    ///
    /// # Errors
    /// When the cache on disk cannot be used.
    pub fn of(
        corpus: Arc<Corpus>,
        config: &Config,
        encoder: &ImageEncoder,
        writer: Writer,
    ) -> Result<HeldOutSet, Error> {
        let mut set = HeldOutSet::encoding(corpus, config, encoder.preprocessing());
        if let FeatureCache::Directory(folder) = &config.data.feature_cache {
            let disk = DiskFeatures::of_held_out(folder, config, encoder, &set.corpus, writer)?;
            set.features = Features::Disk(disk);
        }
        Ok(set)
    }

    /// The set, its features computed in every pass.
    fn encoding(corpus: Arc<Corpus>, config: &Config, preprocessing: &Preprocessing) -> HeldOutSet {
        let Preprocessing { size: image_size, filter, .. } = *preprocessing;
        HeldOutSet {
            corpus,
            features: Features::Encode,
            batch: config.micro_batch().min(MAX_BATCH),
            threads: crate::data::threads(&config.data.loader.threads),
            image_size,
            filter,
            clean: config.data.text.clean,
            seed: config.run.seed,
            named: RefCell::default(),
            captions: config.eval.captions,
            retrieval: config.eval.retrieval,
            rerank: 0,
        }
    }

    /// Number of samples, those that cannot be used included.
    pub fn samples(&self) -> u64 {
        self.corpus.len()
    }

    /// What the shards' indices say cannot be used.
    pub fn problems(&self) -> Vec<Problem> {
        self.corpus.problems().cloned().collect()
    }

    /// What the memory cache could not read.
    pub fn quarantined(&self) -> &[Quarantined] {
        self.features.quarantined()
    }

    /// One line about the cache on disk.
    pub(crate) fn cache_introduction(&self) -> Option<String> {
        self.features.disk().map(DiskFeatures::introduction)
    }

    /// That the cache on disk takes no more; said once.
    pub(crate) fn take_note(&self) -> Option<String> {
        self.features.disk().and_then(DiskFeatures::take_note)
    }

    /// What part of the last pass's features was on disk before it, on all ranks; nothing without such a cache.
    ///
    /// # Errors
    /// When a rank is lost.
    pub(crate) fn take_cache_metrics(&self, ranks: &dyn Ranks) -> Result<Vec<(String, f64)>, Error> {
        let Some(disk) = self.features.disk() else { return Ok(Vec::new()) };
        let (there, not_there) = disk.take_counts();
        let counts = ranks.share_numbers(&[there, not_there])?;
        let [there, not_there] = [0, 1].map(|at| counts.iter().map(|rank| rank[at] as f64).sum::<f64>());
        Ok(vec![("val_cache_hits".into(), there / (there + not_there).max(1.0))])
    }

    /// Samples in order, those that cannot be used left out.
    fn reader(
        &self,
        text: &TextFrame,
        range: Range<u64>,
        pixels: bool,
        features: Option<EvalFeatures>,
    ) -> Result<EvalReader, Error> {
        let options = EvalOptions {
            range,
            batch: self.batch,
            threads: self.threads,
            prefetch: 2,
            image_size: self.image_size,
            filter: self.filter,
            pixels,
            features,
            clean: self.clean,
            pad_id: text.pad_id,
            pad_to_multiple: 1,
            left_out: self.features.left_out(),
        };
        Ok(EvalReader::new(self.corpus.clone(), text.encoder.clone(), options)?)
    }

    /// Begins a pass, of which each rank takes as many batches. `position` is that of the run's stream.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn pass<'a>(
        &'a self,
        assembly: &'a Assembly,
        ranks: &'a dyn Ranks,
        position: u64,
    ) -> Result<HeldOut<'a>, Error> {
        let Assembly { encoder, text, task, .. } = assembly;
        let rule = task.target_rule();
        let batches = self.corpus.len().div_ceil(self.batch as u64);
        let (rank, world) = (ranks.rank() as u64, ranks.world() as u64);
        let begin = |rank: u64| (rank * batches / world * self.batch as u64).min(self.corpus.len());
        let range = begin(rank)..begin(rank + 1);
        let images = range.end - range.start;
        let features = self.features.disk().map(|disk| EvalFeatures { rows: disk.rows().clone(), position });
        let reader = self.reader(text, range, self.features.needs_pixels(), features)?;
        let tell = &|_: &'static str, _, _| {};
        Ok(HeldOut {
            reader,
            encoder,
            text,
            rule,
            set: self,
            ranks,
            images,
            done: 0,
            tell,
            stop: None,
            cut_short: false,
        })
    }

    /// A PNG with the pictures of these samples side by side, with its width and height; the place of one that can no longer be read stays
    /// empty.
    ///
    /// # Errors
    /// When the sheet cannot be encoded.
    pub fn contact_sheet(&self, indices: &[u64]) -> Result<(Vec<u8>, u32, u32), Error> {
        let picture = |&index: &u64| blip2_data::decode(&self.corpus.read(index, Pick::First).ok()?.image).ok();
        let cell = |index| Cell { picture: picture(index), caption: String::new() };
        let cells: Vec<Cell> = indices.iter().map(cell).collect();
        let sheet = blip2_data::contact_sheet(&cells, Layout { columns: cells.len().max(1), side: 112, lines: 0 });
        let png = encode_png(&sheet).map_err(|e| Error::Mismatch(format!("contact sheet: {e}")))?;
        Ok((png, sheet.width as u32, sheet.height as u32))
    }
}

/// Evaluation batches are no larger: the loss is a mean over batches, and memory is for training.
const MAX_BATCH: usize = 256;

impl<'a> HeldOut<'a> {
    /// The same, and `tell` hears how far it is.
    pub fn heard_by(self, tell: Tell<'a>) -> HeldOut<'a> {
        HeldOut { tell, ..self }
    }

    /// The same, and it ends where a signal comes: what it gives is then of no use.
    pub fn until(self, stop: &'a StopSignal) -> HeldOut<'a> {
        HeldOut { stop: Some(stop), ..self }
    }

    /// Whether a signal has ended the pass on any rank.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn was_cut_short(&self) -> Result<bool, Error> {
        self.ranks.any(self.cut_short)
    }

    /// Tells how far the evaluation is.
    pub fn tell(&self, what: &'static str, done: u64, all: u64) {
        (self.tell)(what, done, all);
    }

    /// The next batch: as tensors, and as the host has it (without what stands around the captions).
    ///
    /// # Errors
    /// When samples cannot be read or the device refuses.
    pub fn next_batch(&mut self) -> Option<Result<(Batch, HostBatch), Error>> {
        let read = self.next_features()?;
        Some(read.and_then(|(features, host)| {
            let framed = self.text.frame(host.clone(), 1);
            let batch = Batch::new(&framed, features, self.rule, Share::WHOLE, self.set.seed)?;
            Ok((batch.sent_as(self.set.features.kind(self.encoder)), host))
        }))
    }

    /// The next batch's image features `[B, N, width]`, and the batch as the host has it.
    ///
    /// # Errors
    /// As [`HeldOut::next_batch`].
    pub fn next_features(&mut self) -> Option<Result<(Tensor, HostBatch), Error>> {
        // A rank whose part takes longer than that of others does not hang.
        self.ranks.pulse().beat();
        self.tell("images", self.done, self.images);
        self.cut_short |= self.stop.is_some_and(StopSignal::is_set);
        if self.cut_short {
            return None;
        }
        let host = match self.reader.next()? {
            Ok(host) => host,
            Err(error) => return Some(Err(error.into())),
        };
        self.done += host.size as u64;
        Some(self.set.features.of(&host, self.encoder).map(|features| (features, host)))
    }

    /// The entry that says why a sample which could be read is not used.
    pub fn unused(&self, index: u64, reason: String) -> Quarantined {
        let (shard, key) = self.set.corpus.key(index).unwrap_or_default();
        Quarantined { shard, key, index, reason }
    }

    /// What this pass could not read on any rank, and no pass before it.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn take_quarantined(&mut self) -> Result<Vec<Quarantined>, Error> {
        let mut found = ranks::share(self.ranks, &self.reader.take_quarantined())?.concat();
        found.retain(|sample| self.set.named.borrow_mut().insert(sample.index));
        Ok(found)
    }

    /// How many sample captions are wanted.
    pub fn captions(&self) -> usize {
        self.set.captions
    }

    /// Whether retrieval is to be measured.
    pub fn retrieval(&self) -> bool {
        self.set.retrieval && !self.cut_short
    }

    /// How many candidates of each query are to be re-ranked by ITM; 0: none.
    pub fn rerank(&self) -> usize {
        self.set.rerank
    }

    /// Those who take part.
    pub fn ranks(&self) -> &'a dyn Ranks {
        self.ranks
    }

    /// The tokenizer, to read generated ids.
    pub fn text(&self) -> &TextFrame {
        self.text
    }
}

/// Means of metrics over batches, weighted by samples.
#[derive(Debug, Default)]
pub struct Means {
    sums: Vec<(&'static str, f64)>,
    samples: f64,
}

impl Means {
    /// Adds a batch of this many samples.
    pub fn add(&mut self, metrics: &[(&'static str, Tensor)], samples: usize) {
        if self.sums.is_empty() {
            self.sums = metrics.iter().map(|(name, _)| (*name, 0.0)).collect();
        }
        for ((_, sum), (_, value)) in self.sums.iter_mut().zip(metrics) {
            *sum += value.double_value(&[]) * samples as f64;
        }
        self.samples += samples as f64;
    }

    /// The means over all ranks' batches, each name with `val_` in front.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn finish(self, ranks: &dyn Ranks) -> Result<Vec<(String, f64)>, Error> {
        // Their bits: JSON has no numbers that are not finite.
        let own: Vec<(String, u64)> = self.sums.iter().map(|(name, sum)| (name.to_string(), sum.to_bits())).collect();
        let (mut sums, mut samples): (Vec<(String, f64)>, f64) = (Vec::new(), 0.0);
        for (theirs, count) in ranks::share(ranks, &(own, self.samples))? {
            if sums.is_empty() {
                sums = theirs.iter().map(|(name, _)| (format!("val_{name}"), 0.0)).collect();
            }
            sums.iter_mut().zip(theirs).for_each(|((_, sum), (_, more))| *sum += f64::from_bits(more));
            samples += count;
        }
        Ok(sums.into_iter().map(|(name, sum)| (name, sum / samples)).collect())
    }
}

impl Evaluation {
    /// Measures recall from similarities `[images, texts]`, row after row; images and texts with one id belong together.
    ///
    /// # Errors
    /// The metric's own.
    pub fn add_recall(&mut self, similarity: &[f32], image_ids: &[u64], text_ids: &[u64]) -> Result<(), Error> {
        self.recall = recall_at(&RECALL_RANKS, similarity, image_ids, text_ids)?;
        for recall in &self.recall {
            let k = recall.k;
            self.scalars.push((format!("retrieval_i2t_r{k}"), recall.image_to_text));
            self.scalars.push((format!("retrieval_t2i_r{k}"), recall.text_to_image));
            self.scalars.push((format!("retrieval_r{k}"), recall.mean()));
        }
        Ok(())
    }

    /// The value of a scalar.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.scalars.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    /// The sample texts as a Markdown table.
    pub fn markdown(&self) -> String {
        let cell = |text: &str| one_line(text).replace('|', "\\|");
        let row = |s: &SampleText| format!("| {} | {} | {} |\n", s.index, cell(&s.truth), cell(&s.said));
        format!("| picture | truth | model |\n|---|---|---|\n{}", self.texts.iter().map(row).collect::<String>())
    }
}

/// A text as a part of a line: single blanks for its white space, and nothing in it that a terminal obeys. Captions come from anywhere.
pub fn one_line(text: &str) -> String {
    let shown: String = text.chars().filter(|c| c.is_whitespace() || !c.is_control()).collect();
    shown.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use blip2_data::{Dataset, OpenOptions, PackOptions, Reading, RgbImage, SourceFormat, decode, pack};

    use super::*;

    #[test]
    fn a_text_stays_in_its_cell() {
        let (truth, said) = ("a | b\n\nc".to_owned(), "\u{1b}[2J d\t".to_owned());
        let evaluation = Evaluation { texts: vec![SampleText { index: 7, truth, said }], ..Evaluation::default() };
        assert!(evaluation.markdown().ends_with("|\n| 7 | a \\| b c | [2J d |\n"), "{}", evaluation.markdown());
    }

    #[test]
    fn a_picture_that_cannot_be_read_any_more_leaves_its_place_empty() {
        let folder = tempfile::tempdir().unwrap();
        let picture = RgbImage { width: 8, height: 8, data: vec![10; 192] };
        std::fs::write(folder.path().join("a.png"), encode_png(&picture).unwrap()).unwrap();
        std::fs::write(folder.path().join("pairs.tsv"), "a.png\tone\na.png\ttwo\n").unwrap();
        let packed = pack(&PackOptions {
            source: folder.path().join("pairs.tsv"),
            format: SourceFormat::Captions,
            reading: Reading::default(),
            out: folder.path().join("shards"),
            shard_samples: 1,
            reencode: None,
            progress: None,
        });
        let shards = packed.unwrap().shards;
        let patterns: Vec<String> = shards.iter().map(|path| path.to_str().unwrap().to_owned()).collect();
        let set = HeldOutSet {
            corpus: Arc::new(Dataset::open(&patterns, &OpenOptions::default()).unwrap().into()),
            features: Features::Encode,
            batch: 1,
            threads: 1,
            image_size: 8,
            filter: Filter::Bicubic,
            clean: Clean::Blip,
            seed: 0,
            named: RefCell::default(),
            captions: 2,
            retrieval: false,
            rerank: 0,
        };
        std::fs::remove_file(&shards[1]).unwrap();
        let (png, width, height) = set.contact_sheet(&[0, 1]).unwrap();
        assert_eq!((width, height), (224, 112));
        let sheet = decode(&png).unwrap();
        let at = |x: usize| sheet.data[(56 * 224 + x) * 3];
        assert_eq!((at(56), at(168)), (10, 255));
    }
}
