//! Beam search of one text, with `transformers`' scoring (4.57, `early_stopping = false`).
//!
//! Each step looks at the best `max(2, 1 + end tokens) * beams` continuations. Those that end and rank among the first `beams` become
//! candidates with their score divided by `length ^ length_penalty`; the best that do not end run on. The search is done when the best running
//! text, at its present length, cannot beat the worst of `beams` candidates.

/// The state of one text's search.
#[derive(Debug)]
pub struct BeamSearch {
    beams: usize,
    length_penalty: f64,
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

impl BeamSearch {
    /// A search before its first token: only the first running text counts, since all are equal.
    pub fn new(beams: usize, length_penalty: f64, eos: &[i64]) -> BeamSearch {
        let running = (0..beams).map(|i| Running { score: if i == 0 { 0.0 } else { NEVER }, tokens: Vec::new() });
        BeamSearch {
            beams,
            length_penalty,
            eos: eos.to_vec(),
            running: running.collect(),
            finished: Vec::new(),
            improvable: true,
            steps: 0,
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
        let ends = |token: i64| last || self.eos.contains(&token);
        let mut next = Vec::new();
        let mut picks = Vec::new();
        for (rank, &(score, parent, token)) in best.iter().enumerate() {
            let mut tokens = self.running[parent].tokens.clone();
            if ends(token) {
                if rank < self.beams && self.improvable {
                    if !self.eos.contains(&token) {
                        tokens.push(token);
                    }
                    let score = score / (self.steps as f32).powf(self.length_penalty as f32);
                    self.finished.push(Finished { score, tokens });
                }
            } else if next.len() < self.beams {
                tokens.push(token);
                next.push(Running { score, tokens });
                picks.push((parent, token));
            }
        }
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(self.beams);
        if !last {
            self.running = next;
            let reach = self.running.first().map_or(NEVER, |r| r.score);
            let reach = reach / (self.steps as f32).powf(self.length_penalty as f32);
            let worst = if self.finished.len() == self.beams { self.finished[self.beams - 1].score } else { NEVER };
            self.improvable &= reach > worst;
        }
        picks
    }

    /// Whether no running text can improve on the candidates.
    pub fn is_done(&self) -> bool {
        !self.improvable
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

    #[test]
    fn an_end_token_outside_the_first_beams_is_no_candidate() {
        let mut search = BeamSearch::new(2, 1.0, &[EOS]);
        let picks = search.advance(&[(-0.1, 0, 1), (-0.2, 0, 2), (-0.3, 0, EOS), (-0.4, 0, 3)], false);
        assert_eq!(picks, [(0, 1), (0, 2)]);
        assert!(search.finished.is_empty());
    }

    #[test]
    fn the_longer_text_wins_by_its_mean_score() {
        let mut search = BeamSearch::new(2, 1.0, &[EOS]);
        search.advance(&[(-1.0, 0, EOS), (-1.1, 0, 1), (-1.2, 0, 2), (-9.0, 0, 3)], false);
        search.advance(&[(-1.2, 0, EOS), (-1.4, 0, 5), (-1.5, 1, 5), (-9.0, 0, 3)], false);
        assert_eq!(search.best(), [1]); // -1.2 / 2 beats -1.0 / 1
    }

    #[test]
    fn the_length_limit_ends_running_texts_as_they_are() {
        let mut search = BeamSearch::new(2, 0.0, &[EOS]);
        search.advance(&[(-1.0, 0, 4), (-2.0, 0, 5), (-3.0, 0, 6), (-4.0, 0, 7)], true);
        assert_eq!(search.best(), [4]);
    }

    #[test]
    fn it_is_done_when_nothing_running_can_win() {
        let mut search = BeamSearch::new(2, 1.0, &[EOS]);
        search.advance(&[(-0.1, 0, EOS), (-3.0, 0, 1), (-3.5, 0, 2), (-4.0, 0, 3)], false);
        assert!(!search.is_done());
        search.advance(&[(-3.1, 0, EOS), (-9.0, 0, 1), (-9.5, 1, 2), (-9.9, 0, 3)], false);
        assert!(search.is_done());
    }
}
