//! Re-ranking (BLIP-2, section 4.4): of each query the candidates that similarity puts first are matched one by one, which costs too much for
//! all, and put in order by similarity plus matching score. The others stay behind them, by similarity.
//!
//! Which candidates are matched is known before anything is matched. Ties are broken against the model here too: of equally similar
//! candidates the wrong ones are put on the list first, so a collapsed model still scores 0, and recall at the list's length and beyond is
//! that of similarity alone.

use std::cmp::Ordering;

use crate::retrieval::{Recall, RetrievalError, check, rank, recall_of};

/// For each image the texts that are matched with it, for each text the images.
#[derive(Debug)]
pub struct Shortlists<'a> {
    similarity: &'a [f32],
    image_ids: &'a [u64],
    text_ids: &'a [u64],
    texts_of_image: Vec<Vec<usize>>,
    images_of_text: Vec<Vec<usize>>,
    /// Of each image, the texts on its list and those on whose list it is; ascending.
    pairs: Vec<Vec<usize>>,
}

impl<'a> Shortlists<'a> {
    /// The `k` most similar candidates of each query, all where there are fewer.
    ///
    /// # Shapes
    /// `similarity`: row-major `[image_ids.len(), text_ids.len()]`, larger is more alike.
    ///
    /// # Errors
    /// The matrix has another size, or a query has no right candidate.
    pub fn new(
        k: usize,
        similarity: &'a [f32],
        image_ids: &'a [u64],
        text_ids: &'a [u64],
    ) -> Result<Shortlists<'a>, RetrievalError> {
        check(similarity, image_ids, text_ids)?;
        let (images, texts) = (image_ids.len(), text_ids.len());
        let of_image = |image: usize| first(k, image_ids[image], text_ids, |text| similarity[image * texts + text]);
        let of_text = |text: usize| first(k, text_ids[text], image_ids, |image| similarity[image * texts + text]);
        let texts_of_image: Vec<Vec<usize>> = (0..images).map(of_image).collect();
        let images_of_text: Vec<Vec<usize>> = (0..texts).map(of_text).collect();
        let mut pairs = texts_of_image.clone();
        for (text, images) in images_of_text.iter().enumerate() {
            images.iter().for_each(|&image| pairs[image].push(text));
        }
        for texts in &mut pairs {
            texts.sort_unstable();
            texts.dedup();
        }
        Ok(Shortlists { similarity, image_ids, text_ids, texts_of_image, images_of_text, pairs })
    }

    /// The texts that each image has to be matched with, for both directions together.
    pub fn pairs(&self) -> &[Vec<usize>] {
        &self.pairs
    }

    /// Recall at each of `ks` behind re-ranking.
    ///
    /// `matching`: the score of each of [`pairs`](Self::pairs).
    ///
    /// # Errors
    /// `matching` has another shape.
    pub fn recall(&self, ks: &[usize], matching: &[Vec<f32>]) -> Result<Vec<Recall>, RetrievalError> {
        let (expected, got): (Vec<usize>, Vec<usize>) =
            (self.pairs.iter().map(Vec::len).collect(), matching.iter().map(Vec::len).collect());
        if got != expected {
            let (images, expected, got) = (self.pairs.len(), expected.iter().sum(), got.iter().sum());
            return Err(RetrievalError::Matching { images, expected, got });
        }
        let (images, texts) = (self.image_ids.len(), self.text_ids.len());
        let similarity = |image: usize, text: usize| self.similarity[image * texts + text];
        let sum = |image: usize, text: usize| {
            let at = self.pairs[image].binary_search(&text).ok();
            similarity(image, text) + at.map_or(f32::NAN, |at| matching[image][at])
        };
        let of_image = |image: usize| {
            let scores = scores(texts, &self.texts_of_image[image], |t| similarity(image, t), |t| sum(image, t));
            rank(self.image_ids[image], self.text_ids, |t| scores[t])
        };
        let of_text = |text: usize| {
            let scores = scores(images, &self.images_of_text[text], |i| similarity(i, text), |i| sum(i, text));
            rank(self.text_ids[text], self.image_ids, |i| scores[i])
        };
        let image_ranks: Vec<usize> = (0..images).map(of_image).collect();
        let text_ranks: Vec<usize> = (0..texts).map(of_text).collect();
        Ok(recall_of(ks, &image_ranks, &text_ranks))
    }
}

/// A candidate's place: those on the list before the others, whatever their scores.
type Score = (bool, f32);

fn scores(
    candidates: usize,
    list: &[usize],
    similarity: impl Fn(usize) -> f32,
    sum: impl Fn(usize) -> f32,
) -> Vec<Score> {
    let mut scores: Vec<Score> = (0..candidates).map(|c| (false, similarity(c))).collect();
    list.iter().for_each(|&c| scores[c] = (true, sum(c)));
    scores
}

/// The `k` candidates that come first: more similar ones, then wrong ones, then those with smaller numbers. NaN is never a good similarity
/// for the right candidate and always one for a wrong candidate.
fn first(k: usize, query: u64, candidates: &[u64], similarity: impl Fn(usize) -> f32) -> Vec<usize> {
    let key = |c: usize| {
        let (right, s) = (candidates[c] == query, similarity(c));
        let nan = if right { f32::NEG_INFINITY } else { f32::INFINITY };
        (if s.is_nan() { nan } else { s }, right)
    };
    let order = |&a: &usize, &b: &usize| {
        let ((more, right), (less, also_right)) = (key(a), key(b));
        less.partial_cmp(&more).unwrap_or(Ordering::Equal).then(right.cmp(&also_right)).then(a.cmp(&b))
    };
    let mut all: Vec<usize> = (0..candidates.len()).collect();
    if k < all.len() {
        all.select_nth_unstable_by(k, order);
        all.truncate(k);
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::retrieval::recall_at;

    /// The scores of the pairs that are asked for, from those of all.
    fn of_pairs(lists: &Shortlists, all: &[f32]) -> Vec<Vec<f32>> {
        let texts = lists.text_ids.len();
        lists.pairs().iter().enumerate().map(|(i, row)| row.iter().map(|t| all[i * texts + t]).collect()).collect()
    }

    fn reranked(k: usize, at: usize, similarity: &[f32], matching: &[f32], ids: &[u64]) -> Recall {
        let lists = Shortlists::new(k, similarity, ids, ids).unwrap();
        lists.recall(&[at], &of_pairs(&lists, matching)).unwrap()[0]
    }

    #[test]
    fn by_hand_for_three_pairs() {
        // Image 0 has its text second, image 1 third, image 2 first; texts 0 and 1 have their image third, text 2 first.
        let s = [0.6, 0.8, 0.1, 0.7, 0.2, 0.3, 0.9, 0.5, 0.95];
        // Matching knows every pair.
        let m = [9.0, -9.0, -9.0, -9.0, 9.0, -9.0, -9.0, -9.0, 9.0];
        let third = 1.0 / 3.0;
        let ids = [5, 6, 7];
        // Two candidates each: the right one is not among those of image 1, text 0 and text 1.
        let lists = Shortlists::new(2, &s, &ids, &ids).unwrap();
        assert_eq!(lists.pairs(), [vec![0, 1], vec![0, 2], vec![0, 1, 2]]);
        let got = reranked(2, 1, &s, &m, &ids);
        assert_eq!(got, Recall { k: 1, image_to_text: 2.0 * third, text_to_image: third });
        assert_eq!(reranked(3, 1, &s, &m, &ids).mean(), 1.0);
        // The first place is worth nothing where its pair does not match.
        let against: Vec<f32> = m.iter().map(|m| -m).collect();
        assert_eq!(reranked(2, 1, &s, &against, &ids).mean(), 0.0);
    }

    #[test]
    fn a_collapsed_model_scores_zero_and_nan_never_helps() {
        let ids = [0, 1, 2];
        let right = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        assert_eq!(reranked(2, 2, &[0.5; 9], &right, &ids).mean(), 0.0);
        assert_eq!(reranked(2, 2, &[f32::NAN; 9], &right, &ids).mean(), 0.0);
        assert_eq!(reranked(3, 1, &[0.5; 9], &[0.0; 9], &ids).mean(), 0.0);
        let lost = right.map(|m| if m == 1.0 { f32::NAN } else { m });
        assert_eq!(reranked(3, 2, &right, &lost, &ids).mean(), 0.0);
    }

    #[test]
    fn a_matching_of_another_shape_is_an_error() {
        let lists = Shortlists::new(1, &[0.9, 0.1, 0.2, 0.8], &[1, 2], &[1, 2]).unwrap();
        let message = lists.recall(&[1], &[vec![0.0], vec![]]).unwrap_err().to_string();
        assert_eq!(message, "retrieval: expected matching scores of 2 pairs of 2 images, got 1");
        assert!(Shortlists::new(1, &[0.0; 3], &[1, 2], &[1, 2]).is_err());
    }

    proptest! {
        /// Sets of images with one or more texts each; few levels, so that there are ties.
        #[test]
        fn laws(
            (images, texts, s, m) in (1usize..6, 0usize..6).prop_flat_map(|(groups, extra)| {
                let texts: Vec<u64> = (0..groups + extra).map(|t| (t % groups) as u64).collect();
                let levels = || proptest::collection::vec((0u8..5).prop_map(f32::from), groups * texts.len());
                (Just((0..groups as u64).collect::<Vec<u64>>()), Just(texts.clone()), levels(), levels())
            }),
            k in 1usize..12,
        ) {
            let ks: Vec<usize> = (1..12).collect();
            let recall = |k: usize| {
                let lists = Shortlists::new(k, &s, &images, &texts).unwrap();
                lists.recall(&ks, &of_pairs(&lists, &m)).unwrap()
            };
            // With all candidates on the lists: the order of the sums.
            let sums: Vec<f32> = s.iter().zip(&m).map(|(s, m)| s + m).collect();
            prop_assert_eq!(recall(images.len().max(texts.len())), recall_at(&ks, &sums, &images, &texts).unwrap());
            // Whether the right one is among the first k is similarity's doing alone, and so is what comes behind them.
            let behind = |recall: Vec<Recall>| recall.into_iter().filter(|r| r.k >= k).collect::<Vec<_>>();
            prop_assert_eq!(behind(recall(k)), behind(recall_at(&ks, &s, &images, &texts).unwrap()));
        }
    }
}
