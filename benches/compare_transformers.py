#!/usr/bin/env python3
"""Compares `rpt logprobs` with transformers on a Hugging Face model directory.

    cargo build --release
    python benches/compare_transformers.py --model DIR [--text-file FILE] [--tolerance 1e-4]

Needs torch and transformers. The text is encoded by the model's own tokenizer, and both programs
score the same ids in f32. Printed: the largest difference of a token's log-probability and of a
position's entropy, and how many of the continuations that rpt samples greedily transformers has
too. The exit status is 1 where a difference exceeds the tolerance or a greedy token differs
although transformers' two best logits are further apart than the tolerance.
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
    parser.add_argument("--greedy", type=int, default=8, help="greedy tokens to compare [default: 8]")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="nats [default: 1e-4]")
    parser.add_argument("--rpt", default="target/release/rpt", help="binary [default: target/release/rpt]")
    return parser.parse_args()


def logprobs_of_rpt(options, ids):
    command = [options.rpt, "logprobs", "--json", "--model", options.model, "--ids", ",".join(map(str, ids))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"rpt failed:\n{result.stderr}")
    return json.loads(result.stdout)


def logits_of_transformers(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def largest(a, b):
    return (torch.tensor(a, dtype=torch.float64) - b).abs().max().item() if len(a) else 0.0


def compare_scores(options, logits, ids):
    ours = logprobs_of_rpt(options, ids)
    distribution = torch.log_softmax(logits, -1)
    theirs = distribution[:-1].gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    entropy = -(distribution.exp() * distribution).sum(-1)
    return largest(ours["logprobs"], theirs), largest(ours["entropy"], entropy)


def greedy_agreement(options, model, ids):
    """Along transformers' greedy continuation: at how many positions rpt gives that token the
    log-probability of the best, and whether each disagreement is a tie."""
    prompt, agreed, real = len(ids), 0, 0
    for _ in range(options.greedy):
        ids = [*ids, int(logits_of_transformers(model, ids)[-1].argmax())]
    ours = logprobs_of_rpt(options, ids)["logprobs"]
    logits = logits_of_transformers(model, ids)
    for at in range(prompt, len(ids)):
        two = torch.log_softmax(logits[at - 1], -1).topk(2)
        rival = [*ids[:at], int(two.indices[1])]
        agrees = ours[at - 1] >= logprobs_of_rpt(options, rival)["logprobs"][at - 1]
        agreed += agrees
        real += not agrees and (two.values[0] - two.values[1]).item() > options.tolerance
    return agreed, real


def main():
    options = arguments()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = open(options.text_file, encoding="utf-8").read() if options.text_file else TEXT
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="eager")
    room = model.config.max_position_embeddings - options.greedy
    ids = tokenizer(text)["input_ids"][: min(options.max_tokens, room)]
    logprob, entropy = compare_scores(options, logits_of_transformers(model.eval(), ids), ids)
    agreed, real = greedy_agreement(options, model, ids[: len(ids) // 2 + 1])
    print(
        f"{options.model}: {len(ids)} tokens, largest difference {logprob:.2e} nats (entropy {entropy:.2e}), "
        f"greedy {agreed} of {options.greedy}"
    )
    sys.exit(1 if not max(logprob, entropy) <= options.tolerance or real else 0)


if __name__ == "__main__":
    main()
