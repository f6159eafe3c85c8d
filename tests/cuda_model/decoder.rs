//! Scores and gradients of whole models.

use crate::support::{VOCABULARY, decoder, difference, fast_settings, forest, settings};
use rpt::model::device::{DeviceDecoder, DeviceSettings, DeviceTape, Format, OnDevice};
use rpt::model::{Decoder, Dtype, Forest, Tape, Targets, TokenGradient, TokenScore, Workspace};

const INVERSE_TEMPERATURE: f32 = 1.25;

/// Every row that is not the last of its segment predicts what follows, and so do the last rows, some twice.
fn targets(forest: &Forest) -> (Vec<usize>, Vec<u32>) {
    let mut all = Vec::new();
    for (number, segment) in forest.segments().iter().enumerate() {
        for at in 0..=segment.length {
            if let Some(row) = forest.row_before(number, at) {
                all.push((row, ((row * 7 + number) % VOCABULARY) as u32));
            }
        }
    }
    all.into_iter().unzip()
}

fn slope(at: usize) -> f32 {
    [0.5, -1.0, 0.25, 0.0, 2.0][at % 5]
}

/// Scores and the gradient of the sum of slopes times log-probabilities, by the CPU.
fn by_cpu(decoder: &Decoder, forest: &Forest) -> (Vec<TokenScore>, Vec<f32>) {
    let (mut cache, mut workspace, mut tape) = (decoder.new_cache(), Workspace::default(), Tape::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, &mut workspace, Some(&mut tape)).unwrap();
    let (rows, tokens) = targets(forest);
    let targets = Targets { rows: &rows, tokens: &tokens, inverse_temperature: INVERSE_TEMPERATURE };
    let mut scores = vec![TokenScore::default(); rows.len()];
    let mut gradients = vec![0.0; decoder.layout().len()];
    let derivative = |at: usize, score: &TokenScore| {
        scores[at] = *score;
        TokenGradient::PolicyLogprob(slope(at))
    };
    decoder.backward(&tape, &mut cache, &targets, derivative, &mut gradients, &mut workspace);
    (scores, gradients)
}

/// The same by the device.
fn by_device<T: Format>(
    decoder: &DeviceDecoder<T>,
    forest: &Forest,
    recompute: bool,
) -> (Vec<TokenScore>, Vec<f32>) {
    let batch = decoder.batch(forest).unwrap();
    let mut tape = DeviceTape::new(recompute);
    let x = decoder.forward(&batch, Some(&mut tape)).unwrap();
    let (rows, tokens) = targets(forest);
    let targets = Targets { rows: &rows, tokens: &tokens, inverse_temperature: INVERSE_TEMPERATURE };
    let mut gradients = decoder.device().zeroed("gradients", decoder.layout().len()).unwrap();
    let mut grad_x = decoder.device().zeroed("gradients", x.len()).unwrap();
    let mut scores = vec![TokenScore::default(); rows.len()];
    let derivative = |at: usize, score: &TokenScore| {
        scores[at] = *score;
        slope(at)
    };
    decoder.head_backward(&batch, &x, &targets, derivative, &mut grad_x, &mut gradients).unwrap();
    assert_eq!(decoder.score(&batch, &x, &targets).unwrap(), scores);
    decoder.backward(&batch, tape, grad_x, &mut gradients).unwrap();
    (scores, gradients.download().unwrap())
}

fn on_device(decoder: &Decoder, forest: &Forest, recompute: bool) -> (Vec<TokenScore>, Vec<f32>) {
    with(&settings(), decoder, forest, recompute)
}

fn with(
    settings: &DeviceSettings,
    decoder: &Decoder,
    forest: &Forest,
    recompute: bool,
) -> (Vec<TokenScore>, Vec<f32>) {
    match OnDevice::new(settings, decoder).unwrap() {
        OnDevice::F32(there) => by_device(&there, forest, recompute),
        OnDevice::Bf16(there) => by_device(&there, forest, recompute),
    }
}

#[test]
fn scores_and_gradients_are_those_of_the_cpu() {
    for (family, dtype, tolerance) in
        [(0, Dtype::F32, 2e-5), (1, Dtype::F32, 2e-5), (2, Dtype::F32, 2e-5), (1, Dtype::Bf16, 5e-2)]
    {
        let (decoder, forest) = (decoder(family, dtype), forest(family as u64));
        let expected = by_cpu(&decoder, &forest);
        for settings in [settings(), fast_settings()] {
            let found = with(&settings, &decoder, &forest, false);
            assert_close(&decoder, &found, &expected, tolerance);
            assert_eq!(with(&settings, &decoder, &forest, false), found, "again");
        }
    }
}

fn assert_close(
    decoder: &Decoder,
    (scores, gradients): &(Vec<TokenScore>, Vec<f32>),
    (expected, expected_gradients): &(Vec<TokenScore>, Vec<f32>),
    tolerance: f32,
) {
    for (score, expected) in scores.iter().zip(expected) {
        let differences = [
            score.logprob - expected.logprob,
            score.policy_logprob - expected.policy_logprob,
            score.entropy - expected.entropy,
        ];
        for difference in differences {
            assert!(difference.abs() < 5.0 * tolerance, "{score:?} {expected:?}");
        }
    }
    for parameter in decoder.layout().parameters() {
        let range = parameter.range.clone();
        let apart = difference(&gradients[range.clone()], &expected_gradients[range]);
        assert!(apart < tolerance, "{}: {apart}", parameter.name);
    }
}

#[test]
fn layers_computed_again_give_the_same_bits() {
    for (family, dtype) in [(0, Dtype::F32), (1, Dtype::Bf16)] {
        let (decoder, forest) = (decoder(family, dtype), forest(9));
        assert_eq!(on_device(&decoder, &forest, false), on_device(&decoder, &forest, true));
    }
}

/// Token ids on the path to the end of a segment.
fn path(forest: &Forest, segment: usize) -> Vec<Vec<u32>> {
    let this = &forest.segments()[segment];
    let mut ids = this.parent.map_or_else(Vec::new, |parent| path(forest, parent));
    ids.push(forest.ids()[this.row..this.row + this.length].to_vec());
    ids
}

#[test]
fn a_path_alone_has_the_bits_it_has_in_a_forest() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (decoder, forest) = (decoder(1, dtype), forest(4));
        let score = |forest: &Forest, rows: &[usize]| {
            let tokens = vec![3; rows.len()];
            let targets = Targets { rows, tokens: &tokens, inverse_temperature: INVERSE_TEMPERATURE };
            match OnDevice::new(&settings(), &decoder).unwrap() {
                OnDevice::F32(there) => scores(&there, forest, &targets),
                OnDevice::Bf16(there) => scores(&there, forest, &targets),
            }
        };
        let together = score(&forest, &(0..forest.ids().len()).collect::<Vec<_>>());
        for number in [4, 6, 13] {
            let segment = &forest.segments()[number];
            let mut alone = Forest::default();
            let parts = path(&forest, number);
            parts.iter().fold(None, |parent, ids| Some(alone.add(parent, ids)));
            let rows: Vec<usize> = (segment.position..segment.position + segment.length).collect();
            assert_eq!(score(&alone, &rows), together[segment.row..segment.row + segment.length]);
        }
    }
}

fn scores<T: Format>(decoder: &DeviceDecoder<T>, forest: &Forest, targets: &Targets) -> Vec<TokenScore> {
    let batch = decoder.batch(forest).unwrap();
    let x = decoder.forward(&batch, None).unwrap();
    decoder.score(&batch, &x, targets).unwrap()
}

#[test]
fn weights_come_back_as_they_went() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let original = decoder(2, dtype);
        let mut other = Decoder::new(original.config().clone(), dtype, &vec![0.0; original.layout().len()]);
        match OnDevice::new(&settings(), &original).unwrap() {
            OnDevice::F32(there) => there.download(&mut other).unwrap(),
            OnDevice::Bf16(there) => there.download(&mut other).unwrap(),
        }
        assert_eq!(other.fingerprint(), original.fingerprint());
    }
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let decoder = decoder(0, Dtype::F32).on(Some(&settings()));
    let there = decoder.on_device().unwrap().unwrap();
    let OnDevice::F32(there) = &**there else { unreachable!() };
    let mut forest = Forest::default();
    forest.add(None, &[VOCABULARY as u32]);
    assert!(there.batch(&forest).unwrap_err().to_string().contains("outside the model's vocabulary"));
    forest.clear();
    forest.add(None, &[1; 513]);
    assert!(there.batch(&forest).unwrap_err().to_string().contains("does not fit a model of 512 positions"));
    let half = crate::support::decoder(0, Dtype::F16).on(Some(&settings()));
    assert!(half.on_device().unwrap_err().to_string().contains("float16"));
}
