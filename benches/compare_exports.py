"""Exports against transformers and peft: the same ids of a text, the same log-probabilities?

    python benches/compare_exports.py MODEL_DIR [ADAPTER_DIR BASE_DIR]

Compares the ids that AutoTokenizer gives some texts with those of the directory's tokenizer.json, and
ends with an error where they differ. Then runs `rpt logprobs` (RPT, default target/release/rpt) and
transformers in float32 on the same random ids and prints the largest difference, beside the difference of
each from transformers in float64. With an adapter, MODEL_DIR is the merged export, and peft puts
ADAPTER_DIR on BASE_DIR. Needs torch, transformers and, for adapters, peft.
"""

import json
import os
import subprocess
import sys

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

RPT = os.environ.get("RPT", "target/release/rpt")

# What normalizers and pre-tokenizers treat each in its own way.
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "1 22 333 4444 55555 3.14159, 2026-10-01, x1y22z333",
    "It's what they've done, I'd say; we'll see. DON'T SHOUT, THEY'RE 'TIS o'clock",
    "e\u0301 a\u030a \u00e9 \u00e5 \u212b \ufb01 \uff21 \u1100\u1161\u11a8 \uac01",
    "one\ntwo\n\nthree\n\n\n  four\r\n\r\nfive\n",
    "\tif x:\n\t\treturn  y   # done\n    \n",
    "  two before, two after  ",
    "a\u00a0b\u3000c\u2003\u2003d\u200be",
    "\U0001f642\U0001f643 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2705",
    "Zw\u00f6lf Boxk\u00e4mpfer, \u041f\u0440\u0438\u0432\u0435\u0442, \u6570\u5b66\u306f\u697d\u3057\u3044, \u0646\u0645\u0633\u062a\u0647",
    "......  ====== ``` --- $$\\int_0^1 x^2\\,dx$$ </tag> @user #1",
]


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


def compare_tokenizers(directory, auto):
    own = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    added = " x ".join(token.content for token in own.get_added_tokens_decoder().values())
    for text in [*TEXTS, added, f"x{added}x"]:
        expected, found = own.encode(text).ids, auto.encode(text)
        if found != expected:
            sys.exit(f"{type(auto).__name__} gives {text!r} the ids {found}, not {expected} as tokenizer.json does")
    print(
        f"tokenizer: {type(auto).__name__}, {len(auto)} ids, ends with {auto.eos_token};"
        f" those of tokenizer.json for {len(TEXTS)} texts and all added tokens"
    )


def main():
    merged, *adapter = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    compare_tokenizers(merged, tokenizer)
    single, double = load(merged, adapter, torch.float32), load(merged, adapter, torch.float64)
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
