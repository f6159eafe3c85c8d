"""Exports against transformers and peft: the same log-probabilities?

    python benches/compare_exports.py MODEL_DIR [ADAPTER_DIR BASE_DIR]

Runs `rpt logprobs` (RPT, default target/release/rpt) and transformers in float32 on the same random ids
and prints the largest difference, beside the difference of each from transformers in float64. With an
adapter, MODEL_DIR is the merged export, and peft puts ADAPTER_DIR on BASE_DIR. Needs torch, transformers
and, for adapters, peft.
"""

import json
import os
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

RPT = os.environ.get("RPT", "target/release/rpt")


def ours(directory, ids):
    command = [RPT, "logprobs", "--model", directory, "--ids", ",".join(map(str, ids)), "--json"]
    return torch.tensor(json.loads(subprocess.check_output(command))["logprobs"])


def theirs(model, ids):
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def load(merged, adapter, dtype):
    models = {"transformers": AutoModelForCausalLM.from_pretrained(merged, dtype=dtype)}
    if adapter:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(adapter[1], dtype=dtype)
        models["peft"] = PeftModel.from_pretrained(base, adapter[0]).to(dtype)
    return {name: model.eval() for name, model in models.items()}


def main():
    merged, *adapter = sys.argv[1:]
    single, double = load(merged, adapter, torch.float32), load(merged, adapter, torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    print("tokenizer:", len(tokenizer), "ids, ends with", tokenizer.eos_token)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, len(tokenizer), (n,), generator=generator).tolist() for n in (2, 17, 128, 200)]
    for name in single:
        pairs = [(ours(merged, ids), theirs(single[name], ids), theirs(double[name], ids)) for ids in prompts]
        largest = lambda a, b: max((pair[a] - pair[b]).abs().max().item() for pair in pairs)
        print(
            f"{name}: largest difference of a log-probability {largest(0, 1):.3g};"
            f" from float64: rpt {largest(0, 2):.3g}, {name} {largest(1, 2):.3g}"
        )


main()
