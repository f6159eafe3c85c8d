#!/usr/bin/env python3
"""Compares `rpt` with transformers on random models of every family and rotary scaling.

    cargo build --release
    python benches/compare_families.py --tokenizer DIR

Makes 120 small models on the spot: Qwen2, Qwen3 and Llama; the rope types default, linear, dynamic,
yarn and llama3, in both spellings of config.json; tied and untied heads; head_dim equal to and apart
from hidden_size / heads. Each is scored on the same random ids by `rpt logprobs` and by transformers,
in f32 and in bf16, and continued greedily in f32. `rpt` keeps bf16 weights and sums in f32, so in bf16
it is compared with transformers in f32 on the rounded weights, and with transformers wholly in bf16.
DIR holds a tokenizer.json (a model's directory). Needs torch and transformers.
"""

import argparse
import itertools
import json
import pathlib
import shutil
import subprocess
import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

LENGTH, TRAINED = 160, 64
ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
}


def arguments():
    parser = argparse.ArgumentParser(description="Compare rpt with transformers on every family.")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="directory with a tokenizer.json")
    parser.add_argument("--rpt", default="target/release/rpt", help="binary [default: target/release/rpt]")
    parser.add_argument("--std", type=float, default=0.15, help="of the weights [default: 0.15]")
    return parser.parse_args()


def rpt(options, command, directory, *words):
    words = [options.rpt, command, "--model", directory, "--json", *map(str, words)]
    return json.loads(subprocess.check_output(words))


def settings(rope, spelling, tied, wide, vocabulary):
    """The config.json of a model, apart from its family."""
    values = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if wide else 16,
        "intermediate_size": 176,
        "max_position_embeddings": 4 * TRAINED,
        "tie_word_embeddings": tied,
    }
    scaling = {"rope_type": rope, **ROPES[rope]}
    if spelling == "old":
        values |= {"rope_theta": 10000.0} | ({"rope_scaling": scaling} if rope != "default" else {})
    else:
        values |= {"rope_parameters": {"rope_theta": 10000.0, **scaling}}
    return values


def make(directory, family, values, options):
    architecture = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[family]
    config = {"model_type": family, "architectures": [architecture + "ForCausalLM"], **values}
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).float()
    for name, parameter in model.named_parameters():
        # Biases and norms start at 0 and 1: nothing would show that they are used.
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, options.std)
    model.save_pretrained(directory)
    # transformers writes its own spelling: the one under test is put back.
    (directory / "config.json").write_text(json.dumps(config))
    for path in pathlib.Path(options.tokenizer).glob("tokenizer*.json"):
        shutil.copy(path, directory)


def logprobs(model, ids):
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return scores[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def load(directory, dtype):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def greedy_agrees(options, directory, model, tokenizer):
    """Whether each greedy token of rpt is the one that transformers finds most likely."""
    text = "The sum of two odd numbers is"
    reply = rpt(options, "rollout", directory, "--text", text, "--template", "plain",
                "--temperature", 0, "--max-new-tokens", 16)["replies"][0]["tokens"]
    # The plain template opens a thought after the text.
    ids = tokenizer(text)["input_ids"] + tokenizer("<think>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        best = model(torch.tensor([ids + reply])).logits[0].argmax(-1)[len(ids) - 1 : -1]
    return best.tolist() == reply


def compare(options, directory, tokenizer):
    ids = torch.randint(0, len(tokenizer), (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist()
    words = ("--ids", ",".join(map(str, ids)))
    score = lambda dtype: torch.tensor(rpt(options, "logprobs", directory, *words, "--dtype", dtype)["logprobs"])
    ours = {dtype: score(dtype) for dtype in ("f32", "bf16")}
    single = load(directory, torch.float32)
    greedy = greedy_agrees(options, directory, single, tokenizer)
    f32 = (ours["f32"] - logprobs(single, ids)).abs().max().item()
    for parameter in single.parameters():
        parameter.data = parameter.data.bfloat16().float()
    rounded = (ours["bf16"] - logprobs(single, ids)).abs().max().item()
    wholly = (ours["bf16"] - logprobs(load(directory, torch.bfloat16), ids)).abs()
    return f32, greedy, rounded, wholly.max().item(), wholly.mean().item()


def main():
    options = arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    results = []
    for variation in itertools.product(("qwen2", "qwen3", "llama"), ROPES, ("old", "new"), (True, False), (False, True)):
        family, *rest = variation
        with tempfile.TemporaryDirectory() as directory:
            make(pathlib.Path(directory), family, settings(*rest, len(tokenizer)), options)
            results.append(compare(options, directory, tokenizer))
        print(*variation, *(f"{value:.2e}" for value in results[-1]), flush=True)
    f32, greedy, rounded, wholly, mean = zip(*results)
    print(f"{len(results)} models, {LENGTH} tokens each")
    print(f"f32: largest difference {max(f32):.2e} nats; greedy continuations equal: {sum(greedy)}")
    print(f"bf16 weights, f32 sums on both sides: {max(rounded):.2e}")
    print(f"transformers wholly in bf16: largest {max(wholly):.2e}, largest mean of a model {max(mean):.2e}")


if __name__ == "__main__":
    main()
