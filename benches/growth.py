"""How the cost of a step grows with documents, context, positions, samples, tokens and layers, each doubled three times.

    python benches/growth.py MODEL_DIR benches/growth.svg

Runs `rpt bench step` (RPT, default target/release/rpt) on workloads around D,C,P,G,T = 1,128,2,4,32; for the number of
layers it writes random models of MODEL_DIR's shape (Qwen2, tied embeddings) with 2 to 16 of them. Prints a table and draws
the processor time beside the counted operations and the tokens that training without shared prefixes would compute.
Needs numpy and safetensors.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy
from safetensors.numpy import save_file

RPT = os.environ.get("RPT", "target/release/rpt")
BASE = {"documents": 1, "context": 128, "positions": 2, "samples": 4, "tokens": 32}
FACTORS = [1, 2, 4, 8]
LAYERS = 2
LINES = [
    ("cpu_seconds_per_step", "#1b6ca8", "", "processor time"),
    ("gflop_per_step", "#2a9d5c", "4 3", "counted operations"),
    ("repeated_tokens", "#b0413e", "1 3", "tokens if nothing were shared"),
]


def measure(directory, workload):
    text = ",".join(map(str, workload.values()))
    command = [RPT, "bench", "step", "--model", directory, "--workload", text, "--dtype", "f32", "--json"]
    return json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))


def random_model(source, layers, target):
    """A model of the source's shape with another number of layers."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    with open(os.path.join(source, "config.json")) as file:
        config = json.load(file) | {"num_hidden_layers": layers, "torch_dtype": "float32"}
    config.pop("layer_types", None)
    with open(os.path.join(target, "config.json"), "w") as file:
        json.dump(config, file)
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    keys = hidden // heads * config["num_key_value_heads"]
    random = numpy.random.default_rng(1)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name, rows in [("q", hidden), ("k", keys), ("v", keys)]:
            shapes[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            shapes[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        shapes[at + "self_attn.o_proj.weight"] = (hidden, hidden)
        for name, shape in [("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))]:
            shapes[f"{at}mlp.{name}_proj.weight"] = shape
        shapes[at + "input_layernorm.weight"] = shapes[at + "post_attention_layernorm.weight"] = (hidden,)
    tensors = {name: random.normal(0, 0.02, shape).astype("f4") for name, shape in shapes.items()}
    for name in tensors:
        if "norm" in name:
            tensors[name][:] = 1.0
    save_file(tensors, os.path.join(target, "model.safetensors"), metadata={"format": "pt"})


def series(model):
    figures = {}
    base = measure(model, BASE)
    for name, value in BASE.items():
        grown = [measure(model, BASE | {name: value * factor}) for factor in FACTORS[1:]]
        figures[name] = [base, *grown]
    with tempfile.TemporaryDirectory() as place:
        figures["layers"] = []
        for factor in FACTORS:
            target = os.path.join(place, str(factor))
            random_model(model, LAYERS * factor, target)
            figures["layers"].append(measure(target, BASE))
    return figures


def table(figures):
    print("| doubled | CPU-seconds | unique tokens | tokens if nothing were shared | GFLOP | GFLOP by CPU-second |")
    print("|---|---|---|---|---|---|")
    for name, points in figures.items():
        cells = [
            [f"{point['cpu_seconds_per_step']:.3f}" for point in points],
            [str(point["unique_tokens"]) for point in points],
            [str(point["repeated_tokens"]) for point in points],
            [f"{point['gflop_per_step']:.1f}" for point in points],
            [f"{point['gflop_per_step'] / point['cpu_seconds_per_step']:.0f}" for point in points],
        ]
        print(f"| {name} | " + " | ".join(", ".join(cell) for cell in cells) + " |")


def panel(name, points, left, top):
    width, height = 190, 150
    parts = [f'<text x="{left + width / 2}" y="{top - 8}" text-anchor="middle">{name} x 1, 2, 4, 8</text>']
    for step in range(4):
        y = top + height - step * height / 3
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{2**step}</text>')
    for key, color, dashes, _ in LINES:
        growth = [numpy.log2(point[key] / points[0][key]) for point in points]
        places = [(left + at * width / 3, top + height - value * height / 3) for at, value in enumerate(growth)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>')
    return parts


def draw(figures, path):
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 460" font-family="sans-serif" font-size="12">']
    parts.append('<rect width="780" height="460" fill="white"/>')
    for at, (name, points) in enumerate(figures.items()):
        parts += panel(name, points, 60 + at % 3 * 245, 40 + at // 3 * 200)
    for at, (_, color, dashes, what) in enumerate(LINES):
        x = 60 + at * 220
        parts.append(f'<line x1="{x}" x2="{x + 30}" y1="440" y2="440" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}"/>')
        parts.append(f'<text x="{x + 38}" y="444">{what}</text>')
    with open(path, "w") as file:
        file.write("\n".join([*parts, "</svg>"]) + "\n")


def main():
    model, path = sys.argv[1:]
    figures = series(model)
    table(figures)
    draw(figures, path)


main()
