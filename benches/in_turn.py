#!/usr/bin/env python3
"""Runs two commands in turn and compares figures of theirs: medians, ranges and ratios.

    python benches/in_turn.py --runs 5 --key wall_seconds_per_step:step_s --key cpu_seconds_per_step:cpu_s \\
        'rpt bench step --model nano --workload 4,256,4,8,64 --json' 'python trl_grpo.py --model nano ...'

Each command prints a JSON object as its last line that is one (or as its whole output). A key names a figure in the first
command's object and, behind a colon, in the second's. The ratio is the second's figure over the first's; with `--more`,
where more is better, the first's over the second's. Which of the two goes first changes with every pair.
"""
import argparse
import json
import statistics
import subprocess
import sys


def figures(command):
    """The last JSON object that a command prints."""
    done = subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"error: `{command}` ended with {done.returncode}: {done.stderr[-400:]}")
    for text in [done.stdout, *reversed(done.stdout.splitlines())]:
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict):
            return found
    sys.exit(f"error: `{command}` printed no JSON object")


def figure(found, key):
    if key not in found:
        sys.exit(f"error: there is no figure `{key}` among {', '.join(found)}")
    return float(found[key])


def spread(values):
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--key", action="append", required=True, metavar="FIRST[:SECOND]")
    parser.add_argument("--more", action="store_true", help="more is better")
    parser.add_argument("first")
    parser.add_argument("second")
    arguments = parser.parse_args()
    commands = [arguments.first, arguments.second]
    pairs = {key: [] for key in arguments.key}
    for run in range(arguments.runs):
        order = (0, 1) if run % 2 == 0 else (1, 0)
        found = {which: figures(commands[which]) for which in order}
        for key in pairs:
            first, _, second = key.partition(":")
            pairs[key].append((figure(found[0], first), figure(found[1], second or first)))
        print(f"pair {run + 1} of {arguments.runs}", file=sys.stderr)
    for key in pairs:
        ours, theirs = zip(*pairs[key])
        if arguments.more:
            ratios, ratio = [a / b for a, b in zip(ours, theirs)], statistics.median(ours) / statistics.median(theirs)
        else:
            ratios, ratio = [b / a for a, b in zip(ours, theirs)], statistics.median(theirs) / statistics.median(ours)
        print(f"{key}: {spread(ours)} against {spread(theirs)}: {ratio:.2f}, of pairs {spread(ratios)}")


if __name__ == "__main__":
    main()
