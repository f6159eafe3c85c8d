"""Exports against transformers and peft: the same log-probabilities?

    python benches/compare_exports.py MODEL_DIR [ADAPTER_DIR BASE_DIR]

Runs `rpt logprobs` (RPT, default target/release/rpt) and transformers in float32 on the same random ids
and prints the largest difference. With an adapter, MODEL_DIR is the merged export, and peft puts
ADAPTER_DIR on BASE_DIR. Needs torch, transformers and, for adapters, peft.
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
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def main():
    merged, *adapter = sys.argv[1:]
    models = {"transformers": AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)}
    if adapter:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(adapter[1], dtype=torch.float32)
        models["peft"] = PeftModel.from_pretrained(base, adapter[0])
    tokenizer = AutoTokenizer.from_pretrained(merged)
    print("tokenizer:", len(tokenizer), "ids, ends with", tokenizer.eos_token)
    generator = torch.Generator().manual_seed(0)
    for name, model in models.items():
        model.eval()
        largest = 0.0
        for length in (2, 17, 128, 200):
            ids = torch.randint(0, len(tokenizer), (length,), generator=generator).tolist()
            largest = max(largest, (ours(merged, ids) - theirs(model, ids)).abs().max().item())
        print(f"{name}: largest difference of a log-probability {largest:.3g}")


main()
