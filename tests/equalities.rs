//! One model, one arithmetic: the three equalities, bit for bit, over random forests; and the
//! explicit backward pass against finite differences and against unshared prefixes.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::{model, random_forest};
use rpt::config::{OptimizerConfig, TrainConfig};
use rpt::model::{
    Decoder, Dtype, Extension, Forest, Products, Schedule, Tape, Targets, TokenGradient, TokenScore,
    Workspace,
};
use rpt::train::loss::PolicyLoss;
use rpt::train::{Component, MicroBatch, Target, Totals, Trainer};

const VOCAB: u32 = 90;

/// Normalised hidden states of every row.
fn forward(decoder: &Decoder, forest: &Forest, tape: Option<&mut Tape>) -> Vec<f32> {
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, &mut workspace, tape).unwrap();
    decoder.hidden(&workspace, &(0..forest.ids().len()).collect::<Vec<_>>())
}

/// Token ids on the path to the end of a segment.
fn path(forest: &Forest, segment: usize) -> Vec<u32> {
    let this = &forest.segments()[segment];
    let mut ids = this.parent.map_or_else(Vec::new, |parent| path(forest, parent));
    ids.extend_from_slice(&forest.ids()[this.row..this.row + this.length]);
    ids
}

#[test]
fn a_path_alone_has_the_bits_it_has_in_a_forest() {
    for seed in 0..12 {
        let decoder = model(seed as usize % 3, VOCAB as usize);
        let forest = random_forest(seed, u64::from(VOCAB));
        let together = forward(&decoder, &forest, None);
        let width = decoder.config().hidden_size;
        for (at, segment) in forest.segments().iter().enumerate() {
            let mut alone = Forest::default();
            alone.add(None, &path(&forest, at));
            if alone.ids().is_empty() {
                continue;
            }
            let states = forward(&decoder, &alone, None);
            let own = &states[segment.position * width..];
            assert_eq!(own, &together[segment.row * width..][..segment.length * width], "seed {seed}");
        }
    }
}

#[test]
fn training_forward_equals_prefill() {
    for seed in 0..6 {
        let decoder = model(seed as usize % 3, VOCAB as usize);
        let forest = random_forest(100 + seed, u64::from(VOCAB));
        let with_tape = forward(&decoder, &forest, Some(&mut Tape::default()));
        assert_eq!(with_tape, forward(&decoder, &forest, None));
    }
}

#[test]
fn decoding_token_by_token_equals_prefill() {
    for seed in 0..6 {
        let decoder = model(seed as usize % 3, VOCAB as usize);
        let forest = random_forest(200 + seed, u64::from(VOCAB));
        let together = forward(&decoder, &forest, None);
        let width = decoder.config().hidden_size;
        let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
        let mut nodes = Vec::new();
        // Level by level in order of position: every live leaf grows by one token at a time.
        for segment in forest.segments() {
            let node = cache.insert(segment.parent.map(|parent| nodes[parent]));
            nodes.push(node);
            for at in 0..segment.length {
                cache.extend(node, 1, 0);
                let extension = Extension { node, rows: 0..1 };
                let id = forest.ids()[segment.row + at];
                decoder.forward(&[id], &[extension], &mut cache, &mut workspace, None).unwrap();
                let state = decoder.hidden(&workspace, &[0]);
                assert_eq!(state, together[(segment.row + at) * width..][..width], "seed {seed}");
            }
        }
    }
}

#[test]
fn siblings_decoded_together_equal_prefill() {
    for kind in 0..5 {
        let decoder = model(kind, VOCAB as usize);
        let mut forest = Forest::default();
        let trunk = forest.add(None, &(0..37).collect::<Vec<u32>>());
        for sample in 0..9_u32 {
            let ids: Vec<u32> = (0..21).map(|i| (i * 7 + sample * 13) % VOCAB).collect();
            forest.add(Some(trunk), &ids);
        }
        let together = forward(&decoder, &forest, None);
        let width = decoder.config().hidden_size;
        let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
        let root = cache.insert(None);
        cache.extend(root, 37, 0);
        let extension = Extension { node: root, rows: 0..37 };
        decoder.forward(&forest.ids()[..37], &[extension], &mut cache, &mut workspace, None).unwrap();
        let leaves: Vec<_> = (0..9).map(|_| cache.insert(Some(root))).collect();
        for step in 0..21 {
            let ids: Vec<u32> =
                forest.segments()[1..].iter().map(|leaf| forest.ids()[leaf.row + step]).collect();
            let extensions: Vec<Extension> = leaves
                .iter()
                .enumerate()
                .map(|(row, node)| {
                    cache.extend(*node, 1, 0);
                    Extension { node: *node, rows: row..row + 1 }
                })
                .collect();
            decoder.forward(&ids, &extensions, &mut cache, &mut workspace, None).unwrap();
            let states = decoder.hidden(&workspace, &(0..9).collect::<Vec<_>>());
            for (leaf, state) in forest.segments()[1..].iter().zip(states.chunks(width)) {
                assert_eq!(state, &together[(leaf.row + step) * width..][..width]);
            }
        }
    }
}

/// Inverse temperature of the policy.
const INVERSE_TEMPERATURE: f32 = 1.25;

/// Every token of a forest with a token before it.
#[derive(Default)]
struct Wanted {
    rows: Vec<usize>,
    tokens: Vec<u32>,
    /// Varied derivatives, with respect to one log-probability or the other.
    gradients: Vec<TokenGradient>,
}

impl Wanted {
    fn of(forest: &Forest) -> Self {
        let mut wanted = Self::default();
        for (number, segment) in forest.segments().iter().enumerate() {
            for at in 0..segment.length {
                let Some(row) = forest.row_before(number, at) else { continue };
                wanted.rows.push(row);
                wanted.tokens.push(forest.ids()[segment.row + at]);
                let derivative = ((wanted.rows.len() * 7 % 11) as f32 - 5.0) * 0.1;
                wanted.gradients.push(match wanted.rows.len() % 2 {
                    0 => TokenGradient::Logprob(derivative),
                    _ => TokenGradient::PolicyLogprob(derivative),
                });
            }
        }
        wanted
    }

    fn targets(&self) -> Targets<'_> {
        Targets { rows: &self.rows, tokens: &self.tokens, inverse_temperature: INVERSE_TEMPERATURE }
    }
}

fn loss(decoder: &Decoder, forest: &Forest) -> f64 {
    let wanted = Wanted::of(forest);
    let states = forward(decoder, forest, None);
    let width = decoder.config().hidden_size;
    let states: Vec<f32> =
        wanted.rows.iter().flat_map(|row| &states[row * width..][..width]).copied().collect();
    let scores = decoder.score(&states, &wanted.tokens, INVERSE_TEMPERATURE, &mut Workspace::default());
    let of = |(score, gradient): (&TokenScore, &TokenGradient)| match *gradient {
        TokenGradient::Logprob(derivative) => f64::from(derivative) * f64::from(score.logprob),
        TokenGradient::PolicyLogprob(derivative) => f64::from(derivative) * f64::from(score.policy_logprob),
    };
    scores.iter().zip(&wanted.gradients).map(of).sum()
}

fn gradient(decoder: &Decoder, forest: &Forest) -> Vec<f32> {
    gradient_of(decoder, forest, false)
}

fn gradient_of(decoder: &Decoder, forest: &Forest, recompute: bool) -> Vec<f32> {
    let wanted = Wanted::of(forest);
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let mut tape = Tape::default();
    tape.recompute = recompute;
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, &mut workspace, Some(&mut tape)).unwrap();
    let mut gradients = vec![0.0; decoder.parameters().len()];
    let gradient = |at: usize, _: &TokenScore| wanted.gradients[at];
    decoder.backward(&tape, &mut cache, &wanted.targets(), gradient, &mut gradients, &mut workspace);
    gradients
}

#[test]
fn gradients_match_finite_differences() {
    for kind in 0..3 {
        let mut decoder = model(kind, VOCAB as usize);
        let forest = random_forest(300 + kind as u64, u64::from(VOCAB));
        let gradients = gradient(&decoder, &forest);
        for parameter in decoder.layout().parameters().to_vec() {
            // The direction of the gradient itself has the largest derivative: least rounding.
            let span = parameter.range.clone();
            let norm = gradients[span.clone()].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            if norm < 1e-4 {
                continue;
            }
            let step = 3e-3;
            let shift = |decoder: &mut Decoder, by: f64| {
                let mut values = decoder.parameters();
                for (value, g) in values[span.clone()].iter_mut().zip(&gradients[span.clone()]) {
                    *value += (by * f64::from(*g) / norm) as f32;
                }
                decoder.set_parameters(&values);
            };
            let original = decoder.parameters();
            shift(&mut decoder, step);
            let plus = loss(&decoder, &forest);
            shift(&mut decoder, -2.0 * step);
            let minus = loss(&decoder, &forest);
            decoder.set_parameters(&original);
            let numeric = (plus - minus) / (2.0 * step);
            assert!((numeric / norm - 1.0).abs() < 0.02, "{kind} {}: {numeric} {norm}", parameter.name);
        }
    }
}

#[test]
fn shared_prefixes_give_the_gradients_of_unshared_ones() {
    for kind in 0..5 {
        let decoder = model(kind, VOCAB as usize);
        let forest = random_forest(400 + kind as u64, u64::from(VOCAB));
        let shared = gradient(&decoder, &forest);
        // Every target from its own path, alone.
        let all = Wanted::of(&forest);
        let mut next = 0;
        let mut unshared = vec![0.0_f64; shared.len()];
        for (number, segment) in forest.segments().iter().enumerate() {
            let ids = path(&forest, number);
            for at in 0..segment.length {
                if forest.row_before(number, at).is_none() {
                    continue;
                }
                let mut alone = Forest::default();
                alone.add(None, &ids[..segment.position + at]);
                let (mut cache, mut workspace, mut tape) =
                    (decoder.new_cache(), Workspace::default(), Tape::default());
                let extensions = alone.enter(&mut cache);
                decoder
                    .forward(alone.ids(), &extensions, &mut cache, &mut workspace, Some(&mut tape))
                    .unwrap();
                let mut part = vec![0.0; shared.len()];
                let targets = Targets {
                    rows: &[alone.ids().len() - 1],
                    tokens: &all.tokens[next..=next],
                    inverse_temperature: INVERSE_TEMPERATURE,
                };
                let gradient = |_: usize, _: &TokenScore| all.gradients[next];
                decoder.backward(&tape, &mut cache, &targets, gradient, &mut part, &mut workspace);
                unshared.iter_mut().zip(&part).for_each(|(sum, part)| *sum += f64::from(*part));
                next += 1;
            }
        }
        assert_eq!(next, all.tokens.len());
        let scale = unshared.iter().fold(0.0_f64, |m, g| m.max(g.abs()));
        for (shared, unshared) in shared.iter().zip(&unshared) {
            assert!((f64::from(*shared) - unshared).abs() < 1e-4 * scale, "{kind}: {shared} {unshared}");
        }
    }
}

#[test]
fn gradients_have_the_same_bits_for_any_number_of_threads() {
    let decoder = model(1, VOCAB as usize);
    let forest = random_forest(500, u64::from(VOCAB));
    let in_pool = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| gradient(&decoder, &forest))
    };
    assert_eq!(in_pool(1), in_pool(3));
}

#[test]
fn layers_computed_again_give_the_same_bits() {
    for kind in 0..5 {
        let decoder = model(kind, VOCAB as usize);
        let forest = random_forest(600 + kind as u64, u64::from(VOCAB));
        assert_eq!(gradient_of(&decoder, &forest, true), gradient_of(&decoder, &forest, false));
    }
}

/// What the formats stand for: a bf16 or f16 model is the single-precision model of its own weights.
#[test]
fn stored_formats_change_the_weights_and_nothing_else() {
    for kind in [3, 4] {
        let stored = model(kind, VOCAB as usize);
        let parameters = stored.parameters();
        let widened = Decoder::new(stored.config().clone(), Dtype::F32, &parameters);
        assert_eq!(widened.parameters(), parameters);
        let forest = random_forest(700 + kind as u64, u64::from(VOCAB));
        assert_eq!(gradient(&stored, &forest), gradient(&widened, &forest));
        assert_eq!(loss(&stored, &forest).to_bits(), loss(&widened, &forest).to_bits());
    }
}

/// Products of bf16 are another class of bits, in which the same equalities hold.
#[test]
fn products_of_bf16_keep_the_equalities() {
    let exact = model(3, VOCAB as usize);
    let decoder = exact.clone().with_products(Products::Bf16).unwrap();
    assert_eq!(decoder.parameters(), exact.parameters());
    let forest = random_forest(800, u64::from(VOCAB));
    let together = forward(&decoder, &forest, None);
    assert_eq!(together, forward(&decoder, &forest, Some(&mut Tape::default())));
    assert_ne!(together, forward(&exact, &forest, None));
    let width = decoder.config().hidden_size;
    for (at, segment) in forest.segments().iter().enumerate().filter(|(_, segment)| segment.length > 0) {
        let mut alone = Forest::default();
        alone.add(None, &path(&forest, at));
        let own = &forward(&decoder, &alone, None)[segment.position * width..];
        assert_eq!(own, &together[segment.row * width..][..segment.length * width]);
    }
    let rounded = gradient(&decoder, &forest);
    assert_eq!(rounded, gradient_of(&decoder, &forest, true));
    let products =
        |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let full = gradient(&exact, &forest);
    let cosine = products(&rounded, &full) / (products(&rounded, &rounded) * products(&full, &full)).sqrt();
    assert!(cosine > 0.999, "{cosine}");
}

#[test]
fn products_of_bf16_need_weights_of_bf16() {
    let error = model(0, VOCAB as usize).with_products(Products::Bf16).unwrap_err();
    assert!(error.hint().unwrap().contains("dtype"));
}

/// A document with prompts at several places of its trunk, each with replies; some segments are empty.
fn document(forest: &mut Forest, trunk: &[usize], footer: usize, replies: &[usize]) {
    let mut token = forest.ids().len() as u32;
    let mut tokens = |length: usize| -> Vec<u32> {
        token += 1;
        (0..length as u32).map(|at| (token * 31 + at * 17 + at * at) % VOCAB).collect()
    };
    let (mut parent, mut ends) = (None, Vec::new());
    for length in trunk {
        parent = Some(forest.add(parent, &tokens(*length)));
        ends.push(parent);
    }
    for end in ends {
        let footer = forest.add(end, &tokens(footer));
        for length in replies {
            forest.add(Some(footer), &tokens(*length));
        }
    }
}

/// Everything that has a token before it is to be learned: leaves as replies that this decoder has sampled.
fn micro_batch(decoder: &Decoder, forest: Forest) -> MicroBatch {
    let mut batch = MicroBatch::default();
    let parents: Vec<Option<usize>> = forest.segments().iter().map(|segment| segment.parent).collect();
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, &mut workspace, None).unwrap();
    for (segment, place) in forest.segments().iter().enumerate() {
        for at in 0..=place.length {
            let Some(row) = forest.row_before(segment, at) else { continue };
            let token = (row * 7 + segment) as u32 % VOCAB;
            let state = decoder.hidden(&workspace, &[row]);
            let score = decoder.score(&state, &[token], INVERSE_TEMPERATURE, &mut workspace)[0];
            let component = if parents.contains(&Some(segment)) {
                Component::Likelihood { weight: 0.01 }
            } else {
                Component::Policy {
                    weight: 0.02,
                    advantage: [1.0, -0.5, 0.25][segment % 3],
                    old_logprob: score.policy_logprob,
                    engine_logprob: score.logprob,
                }
            };
            batch.targets.push(Target { segment, at, token, component });
        }
    }
    batch.forest = forest;
    batch
}

/// The gradient of an update (from the first moments of the optimiser), and its sums, where activations have room for the
/// inputs of the layers of so many tokens.
fn updated(decoder: &Decoder, batch: &MicroBatch, tokens: usize) -> (Vec<f32>, Totals) {
    let config = OptimizerConfig { max_grad_norm: 0.0, ..OptimizerConfig::default() };
    let mut trainer = Trainer::new(decoder.clone(), &config, 10).unwrap();
    let lanes = Trainer::gradient_buffers(decoder.layout().len());
    trainer.activation_bytes = Some((tokens * lanes * decoder.input_bytes_per_token()) as u64);
    let reference = model(0, VOCAB as usize);
    let loss = PolicyLoss::new(&TrainConfig { kl_weight: 0.05, ..TrainConfig::default() });
    let batches = std::slice::from_ref(batch);
    let stats = trainer.update(batches, &loss, INVERSE_TEMPERATURE, Some(&reference)).unwrap();
    let state = trainer.state().unwrap();
    let moments = state.optimizer.iter().filter(|(name, _)| name.ends_with("first_moment"));
    (moments.flat_map(|(_, values)| values.to_vec()).collect(), stats.totals)
}

#[test]
fn a_schedule_has_the_scores_of_one_pass_and_its_gradients() {
    let (mut schedules, mut parts, mut kept) = (0, 0, 0);
    for seed in 0..20_u64 {
        let decoder = model(seed as usize % 5, VOCAB as usize);
        let mut forest = random_forest(900 + seed, u64::from(VOCAB));
        if seed % 2 == 0 {
            document(&mut forest, &[20, 9, 0, 17], seed as usize % 3, &[3, 18, 0, 30]);
            document(&mut forest, &[70], 2, &[11; 7]);
        }
        let batch = micro_batch(&decoder, forest);
        let (expected, sums) = updated(&decoder, &batch, 1_000_000);
        let again = updated(&decoder, &batch, 1).1.flops;
        assert!(sums.mismatched == 0 && again > sums.flops);
        let scale = expected.iter().fold(0.0_f32, |most, gradient| most.max(gradient.abs()));
        for tokens in [1000, 130, 60, 20, 1] {
            let (found, totals) = updated(&decoder, &batch, tokens);
            let apart = found.iter().zip(&expected).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()));
            assert!(apart <= 1e-5 * scale, "seed {seed}, {tokens} tokens: {apart} of {scale}");
            assert_eq!(totals.mismatched, 0, "every score has the bits of one pass");
            assert!(
                [sums.flops, again].contains(&totals.flops),
                "every token is computed once in each direction, and again where the tape has no room"
            );
            kept += usize::from(totals.flops == sums.flops && found != expected);
            assert_eq!(totals.policy_tokens, sums.policy_tokens);
            for (found, expected) in [(totals.policy_loss, sums.policy_loss), (totals.kl, sums.kl)] {
                assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{found} {expected}");
            }
            let planned = Schedule::of(&batch.forest, tokens, tokens);
            schedules += planned.iter().filter(|schedule| !schedule.prefix.is_empty()).count();
            parts += planned.iter().map(|schedule| schedule.parts.len()).sum::<usize>();
        }
    }
    assert!(schedules > 60 && parts > 4 * schedules, "{schedules} prefixes, {parts} parts");
    assert!(kept > 5, "parts that fit are not computed again: {kept}");
}

#[test]
fn a_schedule_has_the_same_bits_for_any_number_of_threads() {
    let decoder = model(1, VOCAB as usize);
    let mut forest = random_forest(950, u64::from(VOCAB));
    document(&mut forest, &[40, 30], 2, &[30; 6]);
    let batch = micro_batch(&decoder, forest);
    let in_pool = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| updated(&decoder, &batch, 90))
    };
    let (one, three) = (in_pool(1), in_pool(3));
    assert_eq!(one, three);
    let (whole, _) = updated(&decoder, &batch, 10_000);
    assert_ne!(one.0, whole, "the order of sums is another");
}
