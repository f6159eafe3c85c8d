//! Helpers that several test files use.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

pub(crate) mod shared;

use rpt::config::ScratchModel;
use rpt::model::{Decoder, Dtype, Forest};
use rpt::random::Stream;

/// A small shape; `kind` picks one of the three families.
pub(crate) fn shape(kind: usize) -> ScratchModel {
    ScratchModel {
        hidden_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: Some([4, 2, 1][kind]),
        intermediate_size: 80,
        max_position_embeddings: 256,
        rope_theta: 10_000.0,
        attention_bias: kind == 0,
        qk_norm: kind == 1,
        tie_word_embeddings: kind != 2,
        embedding_std: 0.5,
        attention_bias_std: 0.5,
        zero_init_outputs: false,
        previous_token_head: 0.0,
    }
}

/// A random model of a small shape: kinds 0 to 2 in single precision, 3 in bf16, 4 in f16.
pub(crate) fn model(kind: usize, vocab: usize) -> Decoder {
    let dtype = [Dtype::F32, Dtype::F32, Dtype::F32, Dtype::Bf16, Dtype::F16][kind];
    Decoder::from_scratch(&shape(kind % 3), dtype, vocab, 11 + kind as u64)
}

/// A random forest of a few trees with up to three levels.
pub(crate) fn random_forest(seed: u64, vocab: u64) -> Forest {
    let stream = Stream::new(seed, "forest");
    let mut n = 0;
    let mut draw = |bound: u64| {
        n += 1;
        stream.below(n, bound)
    };
    let mut forest = Forest::default();
    for _ in 0..=draw(3) {
        let mut tree = Vec::new();
        for at in 0..=draw(7) {
            let parent = if at == 0 { None } else { Some(tree[draw(at) as usize]) };
            let length = if at == 0 { 1 + draw(40) } else { draw(20) };
            let ids: Vec<u32> = (0..length).map(|_| draw(vocab) as u32).collect();
            tree.push(forest.add(parent, &ids));
        }
    }
    forest
}
