//! Re-ranking matches pairs as training does, and as LAVIS does.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use blip2_losses::itc;
use blip2_metrics::{Shortlists, recall_at};
use blip2_model::qformer::TextBatch;
use blip2_torchx::params::TensorSource;
use blip2_trainer::batch::{Batch, Negatives, Share, Targets};
use blip2_trainer::evaluation::Gallery;
use blip2_trainer::model_files::ModelFiles;
use blip2_trainer::ranks::Alone;
use blip2_trainer::task::{ForwardOptions, Stage1Task};
use blip2_weights::SafetensorsFile;
use tch::{Device, Kind, Tensor, no_grad};

const FORWARD: ForwardOptions = ForwardOptions { autocast: None, dropout: 0.0, seed: 0 };

fn case() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/stage1")
}

/// The golden case's model and batch.
struct Golden {
    task: Stage1Task,
    features: Tensor,
    ids: Tensor,
    mask: Tensor,
}

impl Golden {
    fn open() -> Golden {
        let files = ModelFiles::open(case()).unwrap();
        let file = SafetensorsFile::open(&case().join("batch.safetensors")).unwrap();
        let [pixels, ids, mask] = ["pixel_values", "input_ids", "attention_mask"].map(|name| file.read(name).unwrap());
        let encoder = files.image_encoder(Device::Cpu, Kind::Float).unwrap();
        let task = files.stage1_task(Device::Cpu, Default::default()).unwrap();
        Golden { task, features: encoder.features_of_normalised(&pixels), ids, mask }
    }

    fn samples(&self) -> i64 {
        self.ids.size()[0]
    }

    /// Some of its samples, as wide as their longest text.
    fn batch(&self, first: i64, count: i64, negatives: Negatives) -> Batch {
        let rows = |tensor: &Tensor| tensor.narrow(0, first, count);
        let (ids, mask) = (rows(&self.ids), rows(&self.mask));
        let longest = mask.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64).max().int64_value(&[]);
        let text = TextBatch::new(ids, &mask).truncated(longest);
        let labels = text.ids.copy();
        let _ = labels.narrow(1, 0, 1).fill_(-100);
        let positions = Tensor::arange_start(first, first + count, (Kind::Int64, Device::Cpu));
        Batch {
            features: rows(&self.features),
            targets: Targets::from_labels(&labels, 0),
            text,
            image_ids: positions.copy(),
            positions,
            negatives,
            share: Share::WHOLE,
            sent_as: Kind::Float,
        }
    }

    /// Scores of all pairs `[images, texts]` as training computes them, with every other sample as the negative in turn.
    fn trained(&self) -> Vec<Vec<f32>> {
        let samples = self.samples();
        let mut scores = vec![vec![f32::NAN; samples as usize]; samples as usize];
        for shift in 1..samples {
            let other: Vec<i64> = (0..samples).map(|i| (i + shift) % samples).collect();
            let given = || Tensor::from_slice(&other);
            let batch = self.batch(0, samples, Negatives::Given(given(), given()));
            let logits = no_grad(|| self.task.losses(&batch, &FORWARD, &Alone).unwrap().itm_logits);
            let logits: Vec<f32> = Vec::try_from(logits.select(1, 1).contiguous()).unwrap();
            for text in 0..samples as usize {
                scores[text][text] = logits[text];
                scores[other[text] as usize][text] = logits[samples as usize + text];
            }
        }
        scores
    }

    /// The same samples as evaluation keeps them, in batches of other widths than the whole.
    fn gallery(&self) -> Gallery {
        let mut gallery = Gallery::default();
        for first in 0..self.samples() {
            gallery.add(&self.batch(first, 1, Negatives::Sample(Tensor::new(), Tensor::new())), &[first as u64]);
        }
        gallery
    }
}

fn assert_close(got: f32, expected: f32) {
    assert!((got - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{got} {expected}");
}

#[test]
fn scores_are_those_of_training_and_of_lavis() {
    let golden = Golden::open();
    let samples = golden.samples() as usize;
    let all: Vec<Vec<usize>> = vec![(0..samples).collect(); samples];
    let told = Cell::new((0, 0));
    let scores = golden.gallery().match_pairs(&golden.task.model, &all, None, &|done, all| told.set((done, all)));
    assert_eq!(told.get(), ((samples * samples) as u64, (samples * samples) as u64));
    let trained = golden.trained();
    for (got, expected) in scores.iter().flatten().zip(trained.iter().flatten()) {
        assert_close(*got, *expected);
    }
    let distinct: BTreeSet<u32> = trained.iter().flatten().map(|score| score.to_bits()).collect();
    assert!(distinct.len() > samples, "pairs differ");

    let read = |file: &str, name: &str| SafetensorsFile::open(&case().join(file)).unwrap().read(name).unwrap();
    let lavis: Vec<f32> = Vec::try_from(read("expected.safetensors", "itm_logits").select(1, 1).contiguous()).unwrap();
    let negative = |name: &str| Vec::<i64>::try_from(read("batch.safetensors", name)).unwrap();
    let (images, texts) = (negative("negative_image_index"), negative("negative_text_index"));
    for i in 0..samples {
        assert_close(scores[i][i], lavis[i]);
        assert_close(scores[images[i] as usize][i], lavis[samples + i]);
        assert_close(scores[i][texts[i] as usize], lavis[2 * samples + i]);
    }
}

/// More pairs of an image than are matched at once, in an order that is not that of the texts' lengths.
#[test]
fn any_number_of_pairs_in_any_order() {
    let golden = Golden::open();
    let samples = golden.samples() as usize;
    let gallery = golden.gallery();
    let match_pairs = |pairs: &[Vec<usize>]| gallery.match_pairs(&golden.task.model, pairs, None, &|_, _| {});
    let all = match_pairs(&vec![(0..samples).collect(); samples]);
    let mut pairs: Vec<Vec<usize>> = vec![vec![]; samples];
    pairs[0] = (0..300).map(|n| (n * n + 1) % samples).collect();
    pairs[samples - 1] = vec![samples - 1];
    let got = match_pairs(&pairs);
    for (image, texts) in pairs.iter().enumerate() {
        assert_eq!(got[image].len(), texts.len());
        texts.iter().zip(&got[image]).for_each(|(&text, &score)| assert_close(score, all[image][text]));
    }
}

#[test]
fn an_image_with_two_texts_is_kept_once() {
    let golden = Golden::open();
    let none = || Negatives::Sample(Tensor::new(), Tensor::new());
    let mut gallery = Gallery::default();
    // Image 1 stands for image 0's second appearance.
    gallery.add(&golden.batch(0, 2, none()), &[7, 7]);
    gallery.add(&golden.batch(2, 1, none()), &[8]);
    let scores = gallery.match_pairs(&golden.task.model, &[vec![1], vec![0]], None, &|_, _| {});
    let trained = golden.trained();
    assert_close(scores[0][0], trained[0][1]);
    assert_close(scores[1][0], trained[2][0]);
}

/// With all candidates on the lists recall is that of ITC + ITM, with one it is ITC's.
#[test]
fn recall_is_that_of_the_sums() {
    let golden = Golden::open();
    let samples = golden.samples() as usize;
    let model = &golden.task.model;
    let text = TextBatch::new(golden.ids.copy(), &golden.mask);
    let similarity = no_grad(|| itc::best_query(&model.embed_images(&golden.features), &model.embed_texts(&text)));
    let similarity: Vec<f32> = Vec::try_from(similarity.flatten(0, 1)).unwrap();
    let ids: Vec<u64> = (0..samples as u64).collect();
    let ks: Vec<usize> = (1..=samples).collect();
    let reranked = |k: usize| {
        let lists = Shortlists::new(k, &similarity, &ids, &ids).unwrap();
        lists.recall(&ks, &golden.gallery().match_pairs(model, lists.pairs(), None, &|_, _| {})).unwrap()
    };
    let trained = golden.trained();
    let sums: Vec<f32> = similarity.iter().zip(trained.iter().flatten()).map(|(itc, itm)| itc + itm).collect();
    let by_itc = recall_at(&ks, &similarity, &ids, &ids).unwrap();
    assert_eq!(reranked(samples), recall_at(&ks, &sums, &ids, &ids).unwrap());
    assert_eq!(reranked(1)[0], by_itc[0]);
}
