//! Random weights for models from scratch, each element a function of (seed, tensor, place).

use super::{Decoder, DecoderConfig, Dtype, Layout, Parameter, Role};
use crate::config::ScratchModel;
use crate::random::Stream;

impl Decoder {
    /// A model from random weights.
    ///
    /// Matrices are normal with variance 1 / columns, the embedding has its own deviation, norms
    /// are one. Output projections may start at zero, so that each block starts as the identity.
    pub fn from_scratch(scratch: &ScratchModel, dtype: Dtype, vocab_size: usize, seed: u64) -> Self {
        let config = DecoderConfig::from_scratch(scratch, vocab_size);
        let layout = Layout::new(&config);
        let mut values = vec![0.0; layout.len()];
        for parameter in layout.parameters() {
            fill(parameter, scratch, seed, &mut values[parameter.range.clone()]);
        }
        if scratch.previous_token_head > 0.0 && config.attention_bias {
            wire_previous_token_head(&config, &layout, scratch.previous_token_head, &mut values);
        }
        Self::new(config, dtype, &values)
    }
}

fn fill(parameter: &Parameter, scratch: &ScratchModel, seed: u64, values: &mut [f32]) {
    let stream = Stream::new(seed, &parameter.name);
    let name = parameter.name.as_str();
    let is_output = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
    let deviation = match parameter.role {
        Role::Norm => {
            values.fill(1.0);
            return;
        }
        Role::Embedding => scratch.embedding_std,
        Role::Matrix if is_output && scratch.zero_init_outputs => 0.0,
        Role::Matrix => 1.0 / (parameter.columns as f32).sqrt(),
        Role::Bias if name.ends_with("v_proj.bias") || name.ends_with("o_proj.bias") => 0.0,
        Role::Bias => scratch.attention_bias_std,
    };
    if deviation > 0.0 {
        for (at, value) in values.iter_mut().enumerate() {
            *value = (stream.normal(at as u64) * f64::from(deviation)) as f32;
        }
    }
}

/// Sets query and key biases of layer 0, head 0 so that the head attends to the previous token:
/// over the three fastest rotary pairs the score is the sum of cos(frequency * (distance - 1)).
fn wire_previous_token_head(config: &DecoderConfig, layout: &Layout, strength: f32, values: &mut [f32]) {
    let (dim, half) = (config.head_dim, config.head_dim / 2);
    let bias = &mut values[layout.layers[0].qkv_bias.clone()];
    let (queries, rest) = bias.split_at_mut(config.heads * dim);
    let (query, key) = (&mut queries[..dim], &mut rest[..dim]);
    query.fill(0.0);
    key.fill(0.0);
    for pair in 0..half.min(3) {
        let frequency = config.rope_theta.powf(-2.0 * pair as f64 / dim as f64);
        query[pair] = strength * frequency.cos() as f32;
        query[half + pair] = -strength * frequency.sin() as f32;
        key[pair] = strength;
    }
}
