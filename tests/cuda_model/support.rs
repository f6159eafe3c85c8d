//! Small models on both sides, and comparisons.

use crate::cuda_emulator;
use rpt::config::ScratchModel;
use rpt::model::device::DeviceSettings;
use rpt::model::{Architecture, Decoder, DecoderConfig, Dtype, Forest, Layout, RopeScaling};
use rpt::random::Stream;

/// Vocabulary of the models.
pub(crate) const VOCABULARY: usize = 131;

/// Device settings of tests: own kernels, since the vendor's library of products is not everywhere.
pub(crate) fn settings() -> DeviceSettings {
    DeviceSettings { device: cuda_emulator::device(), batch_invariant: true }
}

/// The same with the vendor's products.
pub(crate) fn fast_settings() -> DeviceSettings {
    DeviceSettings { batch_invariant: false, ..settings() }
}

/// Two layers of one of three families: Qwen2 (biases, tied), Qwen3 (q/k norm), Llama with biases on its output too.
pub(crate) fn decoder(family: usize, dtype: Dtype) -> Decoder {
    let shape = serde_json::json!({
        "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512,
    });
    let scratch: ScratchModel = serde_json::from_value(shape).unwrap();
    let config = DecoderConfig {
        architecture: [Architecture::Qwen2, Architecture::Qwen3, Architecture::Llama][family],
        attention_bias: family != 1,
        qk_norm: family == 1,
        tied: family == 0,
        rope_scaling: RopeScaling::Default,
        ..DecoderConfig::from_scratch(&scratch, VOCABULARY)
    };
    let stream = Stream::new(family as u64, "device model");
    let layout = Layout::new(&config);
    let mut values: Vec<f32> = (0..layout.len() as u64).map(|at| 0.2 * stream.normal(at) as f32).collect();
    for parameter in layout.parameters().iter().filter(|parameter| parameter.name.contains("norm")) {
        values[parameter.range.clone()].iter_mut().for_each(|value| *value += 1.0);
    }
    Decoder::new(config, dtype, &values)
}

/// Two trees: trunks with footers and replies, an empty segment among them.
pub(crate) fn forest(seed: u64) -> Forest {
    let stream = Stream::new(seed, "device forest");
    let mut drawn = 0;
    let mut draw = |bound: usize| {
        drawn += 1;
        (stream.uniform(drawn) * bound as f64) as usize
    };
    let mut tokens = |length: usize| (0..length).map(|_| draw(VOCABULARY) as u32).collect::<Vec<_>>();
    let mut forest = Forest::default();
    for (trunk, footer, replies) in [(37, 0, [3, 18, 1]), (5, 2, [7, 2, 30])] {
        let first = forest.add(None, &tokens(trunk));
        let second = forest.add(Some(first), &tokens(9));
        for parent in [first, second] {
            let footer = forest.add(Some(parent), &tokens(footer));
            for length in replies {
                forest.add(Some(footer), &tokens(length));
            }
        }
    }
    forest
}

/// The largest difference, relative to the largest value.
pub(crate) fn difference(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let largest = expected.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let differences = actual.iter().zip(expected).map(|(actual, expected)| (actual - expected).abs());
    assert!(actual.iter().all(|value| value.is_finite()));
    differences.fold(0.0, f32::max) / largest.max(f32::MIN_POSITIVE)
}
