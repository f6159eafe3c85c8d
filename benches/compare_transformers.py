#!/usr/bin/env python3
"""Compares `rpt logprobs` with transformers on a Hugging Face model directory.

    cargo build --release
    python benches/compare_transformers.py --model DIR [--text-file FILE] [--tolerance 1e-4]

Needs torch and transformers. Both programs score the same ids in f32, encoded by the model's own
tokenizer; then rpt continues the start of the text greedily, and transformers judges each token.
Printed: the largest difference of a token's log-probability and of a position's entropy, and how
many greedy tokens are transformers' best. The exit status is 1 where a difference exceeds the
tolerance, or a greedy token's log-probability is further than that below the best.
"""

import argparse
import json
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = """The sum of the first n odd numbers is n squared. For n = 4 it is 1 + 3 + 5 + 7 = 16.
To see why, draw a square of n by n dots and cut it into corners: each holds two dots more than
the one inside it. "Is that a proof?" she asked. It is, once one says what the next corner is.
"""


def arguments():
    parser = argparse.ArgumentParser(description="Compare rpt logprobs with transformers.")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--text-file", metavar="FILE", help="text to score [default: a few built-in sentences]")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest sequence [default: 512]")
    parser.add_argument("--greedy", type=int, default=8, help="tokens to sample greedily [default: 8]")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="nats [default: 1e-4]")
    parser.add_argument("--rpt", default="target/release/rpt", help="binary [default: target/release/rpt]")
    return parser.parse_args()


def rpt(options, *words):
    result = subprocess.run([options.rpt, *words, "--model", options.model, "--json"], capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"rpt failed:\n{result.stderr}")
    return json.loads(result.stdout)


def logits_of_transformers(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def largest(a, b):
    return (torch.tensor(a, dtype=torch.float64) - b).abs().max().item() if len(a) else 0.0


def compare_scores(options, logits, ids):
    ours = rpt(options, "logprobs", "--ids", ",".join(map(str, ids)))
    distribution = torch.log_softmax(logits, -1)
    theirs = distribution[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    return largest(ours["logprobs"], theirs), largest(ours["entropy"], entropy)


def compare_greedy(options, model, tokenizer, prompt):
    """How many tokens rpt samples greedily, how many are transformers' best, and how far the worst
    of the others is below the best."""
    # The plain template opens a thought after the text.
    ids = tokenizer(prompt)["input_ids"] + tokenizer("<think>", add_special_tokens=False)["input_ids"]
    sampling = ["--template", "plain", "--temperature", "0", "--max-new-tokens", str(options.greedy)]
    rollout = rpt(options, "rollout", "--text", prompt, *sampling)
    if rollout["prompt_tokens"] != len(ids):
        sys.exit(f"rpt encodes the start of the text as {rollout['prompt_tokens']} tokens, transformers as {len(ids)}")
    tokens = rollout["replies"][0]["tokens"]
    logits = logits_of_transformers(model, ids + tokens)[len(ids) - 1 : -1]
    below = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return len(tokens), (below == 0).sum().item(), below.max().item()


def main():
    options = arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = open(options.text_file, encoding="utf-8").read() if options.text_file else TEXT
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="eager")
    ids = tokenizer(text)["input_ids"][: min(options.max_tokens, model.config.max_position_embeddings)]
    logprob, entropy = compare_scores(options, logits_of_transformers(model.eval(), ids), ids)
    sampled, agreed, below = compare_greedy(options, model, tokenizer, text[:200])
    print(
        f"{options.model}: {len(ids)} tokens, largest difference {logprob:.2e} nats (entropy {entropy:.2e}), "
        f"greedy {agreed} of {sampled}"
    )
    sys.exit(0 if max(logprob, entropy, below) <= options.tolerance else 1)


if __name__ == "__main__":
    main()
