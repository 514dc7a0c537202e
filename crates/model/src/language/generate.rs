//! Text from a frozen language model behind embedded prefixes: greedy, beam, nucleus; batched, whatever kind of model it is.

use blip2_torchx::rng::finalise;
use tch::{Kind, Tensor, no_grad};

use super::LanguageModel;
use super::beam::{BeamRule, BeamSearch, EarlyStopping};
use super::session::Session;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decoding {
    /// The likeliest token.
    Greedy,
    /// The likeliest of several running texts, scored as `transformers` scores them.
    Beam {
        /// Running texts an image, at least 2.
        beams: usize,
        /// Scores are divided by length to this power.
        length_penalty: f64,
        /// When an image's search ends before the length limit.
        early_stopping: EarlyStopping,
    },
    /// A draw from the smallest set of tokens whose probability reaches `top_p`, of the `top_k` likeliest.
    Nucleus {
        /// At most so many tokens, at least 1; their probabilities then count as all there is. `None`: no such limit.
        top_k: Option<usize>,
        /// Probability mass kept, in (0, 1].
        top_p: f64,
        /// Divides the logits, positive.
        temperature: f64,
        /// Draws are a function of (seed, index of the text, step).
        seed: u64,
    },
}

/// When a text may and must end.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// At most so many new tokens.
    pub max_new_tokens: usize,
    /// No end token before so many.
    pub min_new_tokens: usize,
    /// Tokens that end a text.
    pub eos: Vec<i64>,
    /// The choice of tokens.
    pub decoding: Decoding,
}

/// What stands in front of a decoder's new text, or what an encoder-decoder reads: embedded rows `[rows, hidden]` of each image.
pub type Prompt = Tensor;

/// New token ids for each prefix `[rows, hidden]`, cut before the end token.
pub fn generate(model: &LanguageModel, prefixes: &[Prompt], options: &GenerateOptions) -> Vec<Vec<i64>> {
    if prefixes.is_empty() || options.max_new_tokens == 0 {
        return vec![Vec::new(); prefixes.len()];
    }
    no_grad(|| {
        let (session, first) = Session::begin(model, prefixes);
        match options.decoding {
            Decoding::Beam { beams, length_penalty, early_stopping } if beams > 1 => {
                let rule = BeamRule { beams, length_penalty, early_stopping, max_new_tokens: options.max_new_tokens };
                beam(session, &first, options, rule)
            }
            Decoding::Beam { .. } | Decoding::Greedy => {
                step_by_step(session, first, options, |scores, _, _| ints(&scores.argmax(-1, false)))
            }
            Decoding::Nucleus { top_k, top_p, temperature, seed } => {
                step_by_step(session, first, options, |scores, step, rows| {
                    let probabilities = (scores / temperature).softmax(-1, Kind::Float);
                    let (sorted, order) = probabilities.sort(-1, true);
                    (0..rows)
                        .map(|row| {
                            let draw = uniform(seed, row, step);
                            let i = row as i64;
                            nucleus(&floats(&sorted.get(i)), &ints(&order.get(i)), top_k, top_p, draw)
                        })
                        .collect()
                })
            }
        }
    })
}

fn forbid_end(scores: &Tensor, options: &GenerateOptions, step: usize) {
    if step < options.min_new_tokens {
        for &id in &options.eos {
            let _ = scores.select(1, id).fill_(f64::NEG_INFINITY);
        }
    }
}

fn step_by_step(
    mut session: Session,
    first: Tensor,
    options: &GenerateOptions,
    choose: impl Fn(&Tensor, usize, usize) -> Vec<i64>,
) -> Vec<Vec<i64>> {
    let rows = first.size()[0] as usize;
    let mut scores = first;
    let mut texts = vec![Vec::new(); rows];
    let mut ended = vec![false; rows];
    for step in 0..options.max_new_tokens {
        forbid_end(&scores, options, step);
        let tokens = choose(&scores, step, rows);
        for (row, &token) in tokens.iter().enumerate() {
            if options.eos.contains(&token) {
                ended[row] = true;
            } else if !ended[row] {
                texts[row].push(token);
            }
        }
        if step + 1 == options.max_new_tokens || ended.iter().all(|&e| e) {
            break;
        }
        scores = session.step(&tokens);
    }
    texts
}

fn beam(mut session: Session, first: &Tensor, options: &GenerateOptions, rule: BeamRule) -> Vec<Vec<i64>> {
    let (texts, vocabulary) = first.size2().expect("rank 2: [B, vocabulary]");
    let beams = rule.beams;
    let width = beams as i64;
    let device = first.device();
    session.widen(width);
    let mut logits = first.repeat_interleave_self_int(width, 0, None);
    let mut searches: Vec<BeamSearch> = (0..texts).map(|_| BeamSearch::new(rule, &options.eos)).collect();
    let candidates = (1 + options.eos.len()).max(2) as i64 * width;
    for step in 0..options.max_new_tokens {
        let scores = logits.log_softmax(-1, Kind::Float);
        forbid_end(&scores, options, step);
        let running: Vec<f32> = searches.iter().flat_map(BeamSearch::running_scores).collect();
        let total = scores + Tensor::from_slice(&running).to_device(device).unsqueeze(1);
        let (best, index) = total.view([texts, width * vocabulary]).topk(candidates, -1, true, true);
        let last = step + 1 == options.max_new_tokens;
        let mut parents = Vec::new();
        let mut tokens = Vec::new();
        for (i, search) in searches.iter_mut().enumerate() {
            let (best, index) = (floats(&best.get(i as i64)), ints(&index.get(i as i64)));
            let found =
                best.iter().zip(&index).map(|(&score, &at)| (score, (at / vocabulary) as usize, at % vocabulary));
            for (parent, token) in search.advance(&found.collect::<Vec<_>>(), last) {
                parents.push((i * beams + parent) as i64);
                tokens.push(token);
            }
        }
        if last || searches.iter().all(BeamSearch::is_done) {
            break;
        }
        session.select(&parents);
        logits = session.step(&tokens);
    }
    searches.into_iter().map(BeamSearch::best).collect()
}

/// The token at which the kept mass, scaled to 1, reaches `draw`. `probabilities` fall.
fn nucleus(probabilities: &[f32], tokens: &[i64], top_k: Option<usize>, top_p: f64, draw: f64) -> i64 {
    // As in transformers, top_p is a share of what top_k has left.
    let (most, whole) = match top_k {
        None => (probabilities.len(), 1.0),
        Some(top_k) => {
            let most = top_k.clamp(1, probabilities.len());
            (most, probabilities[..most].iter().map(|&p| f64::from(p)).sum())
        }
    };
    let mut kept = 0;
    let mut mass = 0.0;
    while kept < most && (kept == 0 || mass < top_p * whole) {
        mass += f64::from(probabilities[kept]);
        kept += 1;
    }
    let mut rest = draw * mass;
    for (&p, &token) in probabilities[..kept].iter().zip(tokens) {
        rest -= f64::from(p);
        if rest < 0.0 {
            return token;
        }
    }
    tokens[kept - 1]
}

/// A number in [0, 1) from (seed, row, step): splitmix64's finaliser over their mix.
fn uniform(seed: u64, row: usize, step: usize) -> f64 {
    let z = seed
        .wrapping_add((row as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
        .wrapping_add((step as u64 + 1).wrapping_mul(0xD1B5_4A32_D192_ED03));
    (finalise(z) >> 11) as f64 / (1u64 << 53) as f64
}

fn floats(t: &Tensor) -> Vec<f32> {
    let t = t.to_kind(Kind::Float).to_device(tch::Device::Cpu).contiguous();
    let mut out = vec![0.0; t.numel()];
    t.copy_data(&mut out, t.numel());
    out
}

fn ints(t: &Tensor) -> Vec<i64> {
    let t = t.to_kind(Kind::Int64).to_device(tch::Device::Cpu).contiguous();
    let mut out = vec![0; t.numel()];
    t.copy_data(&mut out, t.numel());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nucleus_keeps_the_smallest_set_that_reaches_the_mass() {
        let (p, ids) = ([0.5, 0.3, 0.2], [7, 8, 9]);
        assert_eq!(nucleus(&p, &ids, None, 0.5, 0.999), 7);
        assert_eq!(nucleus(&p, &ids, None, 0.6, 0.999), 8);
        assert_eq!(nucleus(&p, &ids, None, 0.6, 0.6), 7);
        assert_eq!(nucleus(&p, &ids, None, 1.0, 0.999), 9);
        assert_eq!(nucleus(&p, &ids, None, 1e-9, 0.5), 7);
    }

    #[test]
    fn top_k_comes_before_the_share_that_top_p_keeps() {
        let (p, ids) = ([0.5, 0.3, 0.2], [7, 8, 9]);
        assert_eq!(nucleus(&p, &ids, Some(1), 1.0, 0.999), 7);
        assert_eq!(nucleus(&p, &ids, Some(2), 1.0, 0.999), 8);
        assert_eq!(nucleus(&p, &ids, Some(99), 1.0, 0.999), 9);
        // 0.5 is more than 0.6 of 0.8, but less than 0.6 of 1.
        assert_eq!(nucleus(&p, &ids, Some(2), 0.6, 0.999), 7);
    }

    #[test]
    fn draws_are_uniform_and_keyed() {
        let draws: Vec<f64> = (0..1000).map(|i| uniform(3, i, 0)).collect();
        let mean = draws.iter().sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.03, "mean {mean}");
        assert_ne!(uniform(3, 1, 0), uniform(3, 0, 1));
    }
}
