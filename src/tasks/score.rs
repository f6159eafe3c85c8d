//! What models say of the positions of a text.

/// What a proxy model says of one position, given everything before it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PositionScore {
    /// Entropy over the k most probable next tokens, renormalised, in nats.
    pub entropy: f32,
    /// Probability of the true token over the whole vocabulary.
    pub truth_probability: f32,
    /// The most probable token (of equals, the lowest id).
    pub proxy_top: u32,
    /// Probability of the true token under a larger model, where there is one beside the proxy.
    pub larger_truth_probability: Option<f32>,
}

impl PositionScore {
    /// By how many nats the larger model finds the true token more probable than the proxy does.
    pub fn loss_gap(&self) -> f32 {
        self.larger_truth_probability.map_or(0.0, |larger| larger.ln() - self.truth_probability.ln())
    }
}

/// A model that scores positions of text.
pub trait Proxy: Sync {
    /// Scores every token of every piece. A piece is a sequence of token ids with its header;
    /// `scores[i][j]` is the score of token j of piece i given the tokens before it. Nothing comes
    /// before token 0: its score is [`PositionScore::default`].
    ///
    /// # Errors
    /// Fails when the model cannot be run.
    fn score(&self, pieces: &[Vec<u32>], top_k: usize) -> Result<Vec<Vec<PositionScore>>, crate::Error>;
}

/// A proxy with a larger model beside it.
pub struct ComparedProxies<'a> {
    /// Whose scores they are.
    pub proxy: &'a dyn Proxy,
    /// Adds its probability of the truth.
    pub larger: &'a dyn Proxy,
}

impl Proxy for ComparedProxies<'_> {
    fn score(&self, pieces: &[Vec<u32>], top_k: usize) -> Result<Vec<Vec<PositionScore>>, crate::Error> {
        let mut scores = self.proxy.score(pieces, top_k)?;
        let larger = self.larger.score(pieces, top_k)?;
        for (score, larger) in scores.iter_mut().flatten().zip(larger.iter().flatten()) {
            score.larger_truth_probability = Some(larger.truth_probability);
        }
        Ok(scores)
    }
}

/// Scores one row of logits over the vocabulary against the true token.
pub fn score_row(logits: &[f32], truth: u32, top_k: usize) -> PositionScore {
    let best = most_probable(logits, top_k);
    let Some(&(top_logit, proxy_top)) = best.first() else { return PositionScore::default() };
    let total: f64 = logits.iter().map(|&logit| f64::from((logit - top_logit).exp())).sum();
    let truth = logits.get(truth as usize).map_or(0.0, |&logit| f64::from(logit - top_logit).exp());
    let truth_probability = (truth / total) as f32;
    PositionScore { entropy: entropy_of(&best), truth_probability, proxy_top, larger_truth_probability: None }
}

/// Entropy in nats of softmax(logits), restricted to its `k` most probable tokens and
/// renormalised: H = -sum p ln p with p = exp(l) / sum of exp(l) over those k. Between 0 and
/// ln k; NaN if a logit among them is not finite.
pub fn top_k_entropy(logits: &[f32], k: usize) -> f32 {
    entropy_of(&most_probable(logits, k))
}

/// With m the largest logit and Z = sum exp(l - m): H = ln Z - sum exp(l - m) (l - m) / Z.
fn entropy_of(best: &[(f32, u32)]) -> f32 {
    let Some(&(top, _)) = best.first() else { return 0.0 };
    let (mut total, mut weighted) = (0.0_f64, 0.0_f64);
    for &(logit, _) in best {
        let distance = f64::from(logit) - f64::from(top);
        let weight = distance.exp();
        total += weight;
        // An impossible token adds nothing: x exp(x) tends to 0.
        if distance != f64::NEG_INFINITY {
            weighted += weight * distance;
        }
    }
    let entropy = total.ln() - weighted / total;
    // Not `max`, which would turn NaN into 0.
    if entropy < 0.0 { 0.0 } else { entropy as f32 }
}

/// The `k` largest logits with their ids, descending, lower ids first among equals. A NaN counts
/// as the largest, so that it shows in the result.
fn most_probable(logits: &[f32], k: usize) -> Vec<(f32, u32)> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(k.min(logits.len()) + 1);
    for (&logit, id) in logits.iter().zip(0..) {
        // Nearly every logit of a large vocabulary fails this test.
        if best.len() >= k && best.last().is_none_or(|&(worst, _)| logit <= worst) {
            continue;
        }
        let place = best.partition_point(|&(better, _)| better.is_nan() || better >= logit);
        let place = if logit.is_nan() { 0 } else { place };
        best.insert(place, (logit, id));
        best.truncate(k);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference_entropy(logits: &[f32], k: usize) -> f64 {
        let mut sorted: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.truncate(k);
        let total: f64 = sorted.iter().map(|logit| logit.exp()).sum();
        sorted.iter().map(|logit| logit.exp() / total).map(|p| -p * p.ln()).sum()
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(logits in prop::collection::vec(-20.0_f32..20.0, 1..200), k in 1_usize..40) {
            let entropy = f64::from(top_k_entropy(&logits, k));
            prop_assert!((entropy - reference_entropy(&logits, k)).abs() < 1e-5);
            let score = score_row(&logits, 0, k);
            let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            let truth = f64::from(logits[0]).exp() / total;
            prop_assert!((f64::from(score.truth_probability) - truth).abs() < 1e-6);
            let top = logits[score.proxy_top as usize];
            prop_assert!(logits.iter().all(|&logit| logit <= top));
        }
    }

    #[test]
    fn uniform_logits_have_the_largest_entropy() {
        for k in [1, 2, 16] {
            assert!((top_k_entropy(&[3.0; 1000], k) - (k as f32).ln()).abs() < 1e-6);
        }
        assert!((top_k_entropy(&[0.0; 4], 16) - 4_f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn odd_rows_are_told_from_ordinary_ones() {
        assert_eq!(top_k_entropy(&[], 16), 0.0);
        assert_eq!(top_k_entropy(&[5.0, f32::NEG_INFINITY], 2), 0.0);
        assert!(top_k_entropy(&[1.0, f32::NAN, 2.0], 2).is_nan());
        assert!(top_k_entropy(&[f32::NEG_INFINITY; 4], 2).is_nan());
        assert_eq!(score_row(&[1.0, 7.0, 7.0], 99, 2).truth_probability, 0.0);
        assert_eq!(score_row(&[1.0, 7.0, 7.0], 0, 2).proxy_top, 1);
    }
}
