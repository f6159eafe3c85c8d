#!/usr/bin/env python3
"""Writes rotary.json: inverse frequencies and attention factors that transformers computes.

    python tests/golden/rotary.py          # needs torch and transformers 5

Each case is the part of a config.json that decides the rotary embedding, in either spelling.
"""

import json
from pathlib import Path

import transformers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

SHAPE = {
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES = [
    {"model_type": "llama"},
    {"model_type": "qwen2", "rope_theta": 1000000.0},
    {"model_type": "qwen3"},
    {"model_type": "qwen3", "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    {"model_type": "llama", "head_dim": 24, "rope_theta": 500000},
    {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.5}},
    {"model_type": "qwen3", "head_dim": 16, "rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 1e6}},
    {"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 1.7}},
    {"model_type": "llama", "max_position_embeddings": 131072, "head_dim": 64, "rope_theta": 500000.0,
     "rope_scaling": LLAMA3},
    {"model_type": "llama", "max_position_embeddings": 131072,
     "rope_parameters": {**LLAMA3, "factor": 32.0, "rope_theta": 500000.0}},
    {"model_type": "llama", "max_position_embeddings": 2048, "original_max_position_embeddings": 512,
     "rope_scaling": LLAMA3},
    {"model_type": "qwen2", "rope_theta": 1000000.0, "rope_scaling": YARN},
    {"model_type": "qwen3", "head_dim": 64, "rope_theta": 1000000, "rope_scaling": {**YARN, "rope_type": "yarn"}},
    {"model_type": "llama", "max_position_embeddings": 8192, "rope_scaling": {"type": "yarn", "factor": 4}},
    {"model_type": "llama", "max_position_embeddings": 8192,
     "rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 1024}},
    {"model_type": "llama", "rope_scaling": {**YARN, "attention_factor": 1.5}},
    {"model_type": "llama", "rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    {"model_type": "llama", "rope_scaling": {**YARN, "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0}},
    {"model_type": "llama", "rope_scaling": {**YARN, "factor": 40, "mscale": 1.0}},
    {"model_type": "llama", "rope_theta": 1e9, "rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 1,
                                                                "original_max_position_embeddings": 6}},
]


def rotary(case):
    settings = json.loads(json.dumps({**SHAPE, **case}))
    config = AutoConfig.for_model(**settings)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    embedding = model.model.rotary_emb
    return {
        "config": case,
        "inverse_frequencies": embedding.inv_freq.tolist(),
        "attention_factor": float(embedding.attention_scaling),
    }


def main():
    cases = ",\n".join(json.dumps(rotary(case)) for case in CASES)
    text = (
        f'{{"transformers": "{transformers.__version__}",\n"shape": {json.dumps(SHAPE)},\n"cases": [\n{cases}\n]}}\n'
    )
    Path(__file__).with_suffix(".json").write_text(text)


if __name__ == "__main__":
    main()
