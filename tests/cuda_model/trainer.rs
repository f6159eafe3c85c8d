//! Updates: the device's trainer against the CPU's.

use crate::cuda_emulator;
use crate::support::{decoder, difference, forest, settings};
use rpt::config::{OptimizerConfig, OptimizerKind, TrainConfig};
use rpt::model::device::{DeviceDecoder, Format, OnDevice};
use rpt::model::{Decoder, Dtype, Schedule, Targets};
use rpt::train::loss::PolicyLoss;
use rpt::train::{Component, MicroBatch, Target, TrainError, Trainer, UpdateStats};
use std::collections::BTreeMap;

const INVERSE_TEMPERATURE: f32 = 1.25;

fn config() -> OptimizerConfig {
    OptimizerConfig {
        learning_rate: 1e-2,
        max_grad_norm: 0.5,
        weight_decay: 0.1,
        ..OptimizerConfig::default()
    }
}

/// Leaves are sampled replies, and what they stand on is text to learn by heart.
fn batches() -> Vec<MicroBatch> {
    let batch = |seed: u64| {
        let forest = forest(seed);
        let parents: Vec<Option<usize>> = forest.segments().iter().map(|segment| segment.parent).collect();
        let mut batch = MicroBatch { forest, targets: Vec::new() };
        for (segment, place) in batch.forest.segments().iter().enumerate() {
            let is_leaf = !parents.contains(&Some(segment));
            for at in usize::from(place.parent.is_none())..place.length {
                let token = batch.forest.ids()[place.row + at];
                let component = if is_leaf {
                    let advantage = [1.0, -0.5, 0.25][segment % 3];
                    let old_logprob = -4.8 - 0.01 * (token as f32);
                    Component::Policy { weight: 0.02, advantage, old_logprob, engine_logprob: old_logprob }
                } else {
                    Component::Likelihood { weight: 0.01 }
                };
                batch.targets.push(Target { segment, at, token, component });
            }
        }
        batch
    };
    vec![batch(1), batch(2)]
}

fn update(trainer: &mut Trainer, reference: Option<&Decoder>) -> Result<UpdateStats, TrainError> {
    let loss = PolicyLoss::new(&TrainConfig { kl_weight: 0.05, ..TrainConfig::default() });
    let loss = if reference.is_some() { loss } else { PolicyLoss { kl: None, ..loss } };
    trainer.update(&batches(), &loss, INVERSE_TEMPERATURE, reference)
}

fn trainer(decoder: Decoder, on_device: bool) -> Trainer {
    let settings = on_device.then(settings);
    Trainer::new(decoder.on(settings.as_ref()), &config(), 10).unwrap()
}

#[test]
fn updates_are_those_of_the_cpu() {
    for (family, dtype, tolerance) in [(0, Dtype::F32, 1e-3), (1, Dtype::F32, 1e-3), (2, Dtype::Bf16, 0.1)] {
        let start = decoder(family, dtype);
        let reference = decoder(family, dtype).on(Some(&settings()));
        let (mut here, mut there) = (trainer(start.clone(), false), trainer(start.clone(), true));
        for _ in 0..2 {
            let expected = update(&mut here, Some(&start)).unwrap();
            let found = update(&mut there, Some(&reference)).unwrap();
            let pairs = [
                (found.totals.policy_loss, expected.totals.policy_loss),
                (found.totals.likelihood_loss, expected.totals.likelihood_loss),
                (found.totals.entropy, expected.totals.entropy),
                (found.totals.kl, expected.totals.kl),
                (found.totals.mismatch, expected.totals.mismatch),
                (found.gradient_norm, expected.gradient_norm),
            ];
            for (found, expected) in pairs {
                let apart = (found - expected).abs();
                assert!(apart <= tolerance * expected.abs().max(0.1), "{found} is not {expected}");
            }
            assert_eq!(found.totals.policy_tokens, expected.totals.policy_tokens);
            assert_eq!(found.totals.likelihood_tokens, expected.totals.likelihood_tokens);
            assert_eq!(found.totals.flops, expected.totals.flops);
            assert_eq!(found.learning_rate, expected.learning_rate);
        }
        let (here, there) = (here.into_decoder().unwrap(), there.into_decoder().unwrap());
        let moved = |decoder: &Decoder| -> Vec<f32> {
            decoder.parameters().iter().zip(start.parameters()).map(|(now, before)| now - before).collect()
        };
        // An element whose gradient is near zero may move either way.
        let (here, there) = (moved(&here), moved(&there));
        let apart = here.iter().zip(&there).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
        let all = here.iter().map(|a| f64::from(a.abs())).sum::<f64>();
        assert!(apart < tolerance * all, "{family} {dtype:?}: {apart} of {all}");
    }
}

#[test]
fn a_restored_trainer_goes_on_bit_for_bit() {
    let mut whole = trainer(decoder(1, Dtype::Bf16), true);
    update(&mut whole, None).unwrap();
    let saved = whole.state().unwrap();
    let (parameters, updates) = (saved.parameters.to_vec(), saved.updates);
    let moments: BTreeMap<String, Vec<f32>> =
        saved.optimizer.into_iter().map(|(name, values)| (name, values.into_owned())).collect();
    assert!(moments.contains_key("model.layers.1.self_attn.q_norm.weight.second_moment"));
    let expected = update(&mut whole, None).unwrap();

    let shape = decoder(1, Dtype::Bf16);
    let rounded = Decoder::new(shape.config().clone(), Dtype::Bf16, &parameters).on(Some(&settings()));
    let mut second = Trainer::resume(rounded, parameters, &config(), 10).unwrap();
    second
        .restore(updates, |name, values| {
            values.copy_from_slice(&moments[name]);
            Ok::<_, TrainError>(())
        })
        .unwrap();
    let found = update(&mut second, None).unwrap();
    assert_eq!((found.totals, found.gradient_norm), (expected.totals, expected.gradient_norm));
    assert_eq!(second.state().unwrap().parameters, whole.state().unwrap().parameters);
    assert_eq!(second.into_decoder().unwrap().fingerprint(), whole.into_decoder().unwrap().fingerprint());
}

#[test]
fn an_update_that_runs_out_of_memory_is_begun_again_with_less() {
    if cuda_emulator::emulated_device().is_none() {
        return;
    }
    let mut plenty = trainer(decoder(0, Dtype::F32), true);
    let expected = update(&mut plenty, None).unwrap();
    assert_eq!(expected.retries, 0);
    let mut little = trainer(decoder(0, Dtype::F32), true);
    cuda_emulator::refuse_allocation(60);
    let found = update(&mut little, None).unwrap();
    assert_eq!(found.retries, 1);
    assert_eq!(
        found.gradient_norm, expected.gradient_norm,
        "layers that are computed again have the same bits"
    );
    cuda_emulator::refuse_allocation(60);
    let found = update(&mut little, None).unwrap();
    let expected = update(&mut plenty, None).unwrap();
    assert_eq!(found.retries, 1, "now micro-batches run by schedule");
    assert_eq!(found.totals.policy_tokens, expected.totals.policy_tokens);
    let apart = (found.gradient_norm - expected.gradient_norm).abs();
    assert!(
        apart < 1e-4 * expected.gradient_norm,
        "{} is not {}",
        found.gradient_norm,
        expected.gradient_norm
    );
}

/// Log-probabilities of a micro-batch's targets, in one pass.
fn scores<T: Format>(decoder: &DeviceDecoder<T>, batch: &MicroBatch) -> Vec<f32> {
    let row = |target: &Target| batch.forest.row_before(target.segment, target.at).unwrap();
    let rows: Vec<usize> = batch.targets.iter().map(row).collect();
    let tokens: Vec<u32> = batch.targets.iter().map(|target| target.token).collect();
    let there = decoder.batch(&batch.forest).unwrap();
    let x = decoder.forward(&there, None).unwrap();
    let targets = Targets { rows: &rows, tokens: &tokens, inverse_temperature: INVERSE_TEMPERATURE };
    decoder.score(&there, &x, &targets).unwrap().iter().map(|score| score.logprob).collect()
}

#[test]
fn a_schedule_has_the_scores_of_one_pass_and_its_gradients() {
    for (family, dtype, tolerance) in [(0, Dtype::F32, 1e-5), (1, Dtype::F32, 1e-5), (2, Dtype::Bf16, 2e-2)] {
        let start = decoder(family, dtype);
        let mut batch = batches().swap_remove(family % 2);
        let logprobs = match OnDevice::new(&settings(), &start).unwrap() {
            OnDevice::F32(there) => scores(&there, &batch),
            OnDevice::Bf16(there) => scores(&there, &batch),
        };
        for (target, logprob) in batch.targets.iter_mut().zip(logprobs) {
            if let Component::Policy { engine_logprob, .. } = &mut target.component {
                *engine_logprob = logprob;
            }
        }
        let reference = decoder(0, Dtype::F32).on(Some(&settings()));
        let updated = |tokens: usize| {
            let config = OptimizerConfig { max_grad_norm: 0.0, ..config() };
            let mut trainer = Trainer::new(start.clone().on(Some(&settings())), &config, 10).unwrap();
            trainer.activation_bytes = Some((tokens * start.input_bytes_per_token()) as u64);
            let loss = PolicyLoss::new(&TrainConfig { kl_weight: 0.05, ..TrainConfig::default() });
            let batches = std::slice::from_ref(&batch);
            let stats = trainer.update(batches, &loss, INVERSE_TEMPERATURE, Some(&reference)).unwrap();
            let state = trainer.state().unwrap();
            let moments = state.optimizer.iter().filter(|(name, _)| name.ends_with("first_moment"));
            (moments.flat_map(|(_, values)| values.to_vec()).collect::<Vec<f32>>(), stats.totals)
        };
        let (expected, sums) = updated(batch.forest.ids().len());
        assert_eq!(sums.mismatched, 0);
        for tokens in [70, 1] {
            let planned = Schedule::of(&batch.forest, tokens, tokens);
            assert!(planned.iter().all(|schedule| !schedule.prefix.is_empty() && schedule.parts.len() > 1));
            let (found, totals) = updated(tokens);
            let apart = difference(&found, &expected);
            assert!(apart < tolerance, "family {family} {dtype:?}, {tokens} tokens: {apart}");
            assert_eq!(totals.mismatched, 0, "every score has the bits of one pass");
            assert_eq!(totals.flops, sums.flops, "every token is computed once in each direction, and again");
            for (found, expected) in [(totals.policy_loss, sums.policy_loss), (totals.kl, sums.kl)] {
                assert!((found - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{found} {expected}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_changes_nothing() {
    let mut trainer = trainer(decoder(0, Dtype::F32), true);
    let before = trainer.state().unwrap().parameters.into_owned();
    let mut batches = batches();
    batches[0].targets[3].component = Component::Likelihood { weight: f32::NAN };
    let loss = PolicyLoss::new(&TrainConfig::default());
    let error = trainer.update(&batches, &loss, 1.0, None).unwrap_err();
    assert!(matches!(error, TrainError::NonFiniteLoss { update: 0, .. }), "{error}");
    let large = |target: &mut Target| target.component = Component::Likelihood { weight: 3e38 };
    batches[0].targets.iter_mut().for_each(large);
    let error = trainer.update(&batches, &loss, 1.0, None).unwrap_err().to_string();
    assert!(error.contains("is not finite at row"), "{error}");
    assert_eq!(trainer.state().unwrap().parameters, before);
}

#[test]
fn what_only_the_cpu_can_do_is_refused() {
    let config = OptimizerConfig { kind: OptimizerKind::Muon, ..config() };
    let there = decoder(0, Dtype::F32).on(Some(&settings()));
    let error = Trainer::new(there, &config, 1).err().unwrap();
    assert!(error.to_string().contains("Muon") && error.hint().unwrap().contains("cpu"), "{error}");
}

#[test]
fn whoever_shares_a_decoder_keeps_its_weights() {
    let start = decoder(0, Dtype::F32).on(Some(&settings()));
    start.on_device().unwrap();
    let mut trainer = Trainer::new(start.clone(), &config(), 10).unwrap();
    update(&mut trainer, None).unwrap();
    // Neither the one that it started from changes, nor one that was taken on the way.
    let mut between = trainer.decoder().clone();
    update(&mut trainer, None).unwrap();
    let once = {
        let mut trainer = Trainer::new(start.clone(), &config(), 10).unwrap();
        update(&mut trainer, None).unwrap();
        trainer.into_decoder().unwrap().fingerprint()
    };
    between.bring_back().unwrap();
    assert_eq!(between.fingerprint(), once);
    let mut again = start.clone();
    again.bring_back().unwrap();
    assert_eq!(again.fingerprint(), start.fingerprint());
    assert_ne!(trainer.into_decoder().unwrap().fingerprint(), start.fingerprint());
}

#[test]
fn moments_of_bf16_and_offloaded_ones_move_the_weights_alike() {
    let start = decoder(1, Dtype::Bf16);
    let moved = |config: &OptimizerConfig| {
        let mut trainer = Trainer::new(start.clone().on(Some(&settings())), config, 10).unwrap();
        for _ in 0..2 {
            update(&mut trainer, None).unwrap();
        }
        let saved = trainer.state().unwrap();
        assert_eq!(saved.updates, 2);
        let (name, values) = &saved.optimizer[0];
        assert_eq!(name, "model.embed_tokens.weight.first_moment");
        assert!(values.iter().any(|value| *value != 0.0));
        let parameters = saved.parameters.to_vec();
        let rounded = Decoder::new(start.config().clone(), Dtype::Bf16, &parameters);
        assert_eq!(trainer.into_decoder().unwrap().fingerprint(), rounded.fingerprint());
        parameters
    };
    let before = start.parameters();
    let expected = moved(&config());
    for other in
        [OptimizerConfig { moments: Dtype::Bf16, ..config() }, OptimizerConfig { offload: true, ..config() }]
    {
        let found = moved(&other);
        let apart = found.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
        let all = before.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs())).sum::<f64>();
        let limit = if other.offload { 1e-4 } else { 0.05 };
        assert!(apart < limit * all, "{other:?}: {apart} of {all}");
    }
}

#[test]
fn an_average_follows_the_parameters_wherever_they_lie() {
    let kept = OptimizerConfig { ema_decay: 0.75, ..config() };
    let others = [
        OptimizerConfig { moments: Dtype::Bf16, ..kept.clone() },
        OptimizerConfig { offload: true, ..kept.clone() },
    ];
    for config in others.into_iter().chain([kept]) {
        let start = decoder(1, Dtype::Bf16);
        let mut expected = start.parameters();
        let mut trainer = Trainer::new(start.on(Some(&settings())), &config, 10).unwrap();
        for _ in 0..2 {
            update(&mut trainer, None).unwrap();
            let state = trainer.state().unwrap();
            for (average, now) in expected.iter_mut().zip(state.parameters.iter()) {
                *average = 0.75 * *average + 0.25 * now;
            }
            let averages = state.optimizer.iter().filter(|(name, _)| name.strip_suffix(".ema").is_some());
            let found: Vec<f32> = averages.flat_map(|(_, values)| values.to_vec()).collect();
            assert_eq!(found.len(), expected.len());
            let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-6, "{config:?}: {apart}");
        }
    }
}

#[test]
fn muon_runs_where_it_is_offloaded() {
    let config = OptimizerConfig { kind: OptimizerKind::Muon, offload: true, ..config() };
    let start = decoder(0, Dtype::F32);
    let mut here = Trainer::new(start.clone(), &config, 10).unwrap();
    let mut there = Trainer::new(start.clone().on(Some(&settings())), &config, 10).unwrap();
    update(&mut here, None).unwrap();
    update(&mut there, None).unwrap();
    let apart = difference(&there.state().unwrap().parameters, &here.state().unwrap().parameters);
    assert!(apart < 1e-3, "{apart}");
}
