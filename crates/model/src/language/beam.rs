//! Beam search of one text, with `transformers`' scoring (4.57).
//!
//! Each step looks at the best `max(2, 1 + end tokens) * beams` continuations. Those that end and rank among the first `beams` become
//! candidates with their score divided by `length ^ length_penalty`, the length counting new tokens and the end token; the best that do not
//! end run on. When the search is done, [`EarlyStopping`] says.

/// When the search of a text is done before the length limit: never with fewer than `beams` candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EarlyStopping {
    /// When the best running text, at its present length, cannot beat the worst candidate (`False` in `transformers`).
    #[default]
    Off,
    /// With `beams` candidates (`True`).
    On,
    /// When the best running text cannot beat the worst candidate at the length that suits it best: the limit where longer texts score
    /// higher (`"never"`).
    Never,
}

/// How texts are scored and when a search ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BeamRule {
    /// Running texts, and candidates that are kept.
    pub beams: usize,
    /// Scores are divided by length to this power.
    pub length_penalty: f64,
    /// When the search ends before the length limit.
    pub early_stopping: EarlyStopping,
    /// The length limit.
    pub max_new_tokens: usize,
}

/// The state of one text's search.
#[derive(Debug)]
pub struct BeamSearch {
    rule: BeamRule,
    eos: Vec<i64>,
    running: Vec<Running>,
    finished: Vec<Finished>,
    improvable: bool,
    steps: usize,
}

#[derive(Debug, Clone)]
struct Running {
    score: f32,
    tokens: Vec<i64>,
}

#[derive(Debug, Clone)]
struct Finished {
    score: f32,
    tokens: Vec<i64>,
}

/// A continuation: accumulated log-probability, index of the running text, token.
pub type Continuation = (f32, usize, i64);

/// The score of what does not exist yet.
const NEVER: f32 = -1e9;

impl BeamRule {
    fn score(&self, log_probability: f32, length: usize) -> f32 {
        log_probability / (length as f64).powf(self.length_penalty) as f32
    }
}

impl BeamSearch {
    /// A search before its first token: only the first running text counts, since all are equal.
    pub fn new(rule: BeamRule, eos: &[i64]) -> BeamSearch {
        let running = (0..rule.beams).map(|i| Running { score: if i == 0 { 0.0 } else { NEVER }, tokens: Vec::new() });
        BeamSearch {
            eos: eos.to_vec(),
            running: running.collect(),
            finished: Vec::new(),
            improvable: true,
            steps: 0,
            rule,
        }
    }

    /// Accumulated log-probabilities of the running texts.
    pub fn running_scores(&self) -> Vec<f32> {
        self.running.iter().map(|r| r.score).collect()
    }

    /// Takes the best continuations, best first; with `last`, the length limit ends every one of them. Returns, for each text that runs on, the
    /// text it continues and its new token.
    pub fn advance(&mut self, best: &[Continuation], last: bool) -> Vec<(usize, i64)> {
        self.steps += 1;
        let open = !self.is_done();
        let beams = self.rule.beams;
        let ends = |token: i64| last || self.eos.contains(&token);
        let mut next = Vec::new();
        let mut picks = Vec::new();
        for (rank, &(score, parent, token)) in best.iter().enumerate() {
            let mut tokens = self.running[parent].tokens.clone();
            if ends(token) {
                if rank < beams && open {
                    if !self.eos.contains(&token) {
                        tokens.push(token);
                    }
                    self.finished.push(Finished { score: self.rule.score(score, self.steps), tokens });
                }
            } else if next.len() < beams {
                tokens.push(token);
                next.push(Running { score, tokens });
                picks.push((parent, token));
            }
        }
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(beams);
        if !last {
            self.running = next;
            let length = match self.rule.early_stopping {
                EarlyStopping::Never if self.rule.length_penalty > 0.0 => self.rule.max_new_tokens,
                _ => self.steps,
            };
            let reach = self.rule.score(self.running.first().map_or(NEVER, |r| r.score), length);
            let worst = if self.is_full() { self.finished[beams - 1].score } else { NEVER };
            self.improvable &= reach > worst;
        }
        picks
    }

    fn is_full(&self) -> bool {
        self.finished.len() == self.rule.beams
    }

    /// Whether no candidate is looked for any more.
    pub fn is_done(&self) -> bool {
        !self.improvable || (self.rule.early_stopping == EarlyStopping::On && self.is_full())
    }

    /// The best candidate, without its end token.
    pub fn best(self) -> Vec<i64> {
        let running = self.running.into_iter().next().map(|r| r.tokens).unwrap_or_default();
        self.finished.into_iter().next().map_or(running, |f| f.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EOS: i64 = 9;

    fn search(length_penalty: f64, early_stopping: EarlyStopping) -> BeamSearch {
        BeamSearch::new(BeamRule { beams: 2, length_penalty, early_stopping, max_new_tokens: 20 }, &[EOS])
    }

    #[test]
    fn an_end_token_outside_the_first_beams_is_no_candidate() {
        let mut search = search(1.0, EarlyStopping::Off);
        let picks = search.advance(&[(-0.1, 0, 1), (-0.2, 0, 2), (-0.3, 0, EOS), (-0.4, 0, 3)], false);
        assert_eq!(picks, [(0, 1), (0, 2)]);
        assert!(search.finished.is_empty());
    }

    #[test]
    fn the_longer_text_wins_by_its_mean_score() {
        let mut search = search(1.0, EarlyStopping::Off);
        search.advance(&[(-1.0, 0, EOS), (-1.1, 0, 1), (-1.2, 0, 2), (-9.0, 0, 3)], false);
        search.advance(&[(-1.2, 0, EOS), (-1.4, 0, 5), (-1.5, 1, 5), (-9.0, 0, 3)], false);
        assert_eq!(search.best(), [1]); // -1.2 / 2 beats -1.0 / 1
    }

    #[test]
    fn the_length_limit_ends_running_texts_as_they_are() {
        let mut search = search(0.0, EarlyStopping::Off);
        search.advance(&[(-1.0, 0, 4), (-2.0, 0, 5), (-3.0, 0, 6), (-4.0, 0, 7)], true);
        assert_eq!(search.best(), [4]);
    }

    #[test]
    fn it_is_done_when_nothing_running_can_win() {
        let mut search = search(1.0, EarlyStopping::Off);
        search.advance(&[(-0.1, 0, EOS), (-3.0, 0, 1), (-3.5, 0, 2), (-4.0, 0, 3)], false);
        assert!(!search.is_done());
        search.advance(&[(-3.1, 0, EOS), (-9.0, 0, 1), (-9.5, 1, 2), (-9.9, 0, 3)], false);
        assert!(search.is_done());
    }

    /// Two candidates after the first step, and a running text that is worse at present but better by its mean at the length limit.
    fn two_ended(early_stopping: EarlyStopping) -> BeamSearch {
        let mut search = search(1.0, early_stopping);
        search.advance(&[(-0.5, 0, 1), (-0.6, 0, 2), (-4.0, 0, 3), (-5.0, 0, 4)], false);
        search.advance(&[(-0.9, 0, EOS), (-1.0, 1, EOS), (-1.8, 0, 5), (-2.0, 1, 6)], false);
        search
    }

    #[test]
    fn early_stopping_ends_the_search_with_as_many_candidates_as_beams() {
        // -1.8 / 2 cannot beat -1.0 / 2 at the present length, but at the limit, where it is -1.8 / 20.
        assert!(two_ended(EarlyStopping::Off).is_done());
        assert!(two_ended(EarlyStopping::On).is_done());
        assert!(!two_ended(EarlyStopping::Never).is_done());
        // A running text that can win does not keep a search open whose candidates are complete.
        for (early_stopping, done) in [(EarlyStopping::Off, false), (EarlyStopping::On, true)] {
            let mut search = search(1.0, early_stopping);
            search.advance(&[(-0.5, 0, 1), (-0.6, 0, EOS), (-0.7, 0, 3), (-5.0, 0, 4)], false);
            search.advance(&[(-0.6, 0, 5), (-0.9, 0, EOS), (-1.0, 1, 6), (-2.0, 1, 7)], false);
            assert_eq!(search.is_done(), done, "{early_stopping:?}");
            search.advance(&[(-0.6, 0, EOS), (-1.0, 1, EOS), (-2.0, 0, 6), (-3.0, 1, 7)], false);
            assert_eq!(search.best(), if done { vec![1] } else { vec![1, 5] }, "{early_stopping:?}");
        }
    }
}
