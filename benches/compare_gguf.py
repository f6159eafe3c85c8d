"""An export, converted by llama.cpp's convert_hf_to_gguf.py, against rpt: the same log-probabilities?

    python convert_hf_to_gguf.py MODEL_DIR --outtype f32 --outfile FILE.gguf
    python benches/compare_gguf.py MODEL_DIR FILE.gguf

Lets llama.cpp go on greedily from a few texts, given as text and as the ids that MODEL_DIR's tokenizer.json
gives them; ends with an error where both do not go on alike. Then asks `rpt logprobs` (RPT, default
target/release/rpt) for the same tokens and prints the largest difference. Needs xllamacpp and tokenizers.
"""

import json
import os
import subprocess
import sys

import xllamacpp
from tokenizers import Tokenizer

RPT = os.environ.get("RPT", "target/release/rpt")
TEXTS = [
    "It's 12345, don't",
    "To be, or not to be: that is",
    "e\u0301 Zw\u00f6lf \U0001f642  two\n\n\tthree   ",
    "KING:\nWE'RE 2026 x1y22z333 \r\n\r\n",
    "What light through yonder",
]


def ours(directory, ids):
    command = [RPT, "logprobs", "--model", directory, "--ids", ",".join(map(str, ids)), "--json"]
    return json.loads(subprocess.check_output(command))["logprobs"]


def serve(file):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel, parameters.port, parameters.warmup = 512, 1, 0, False
    # Its defaults round keys and values to f16.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


def go_on(server, prompt):
    request = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 1}
    answer = server.handle_completions(request)
    return answer["usage"], answer["choices"][0]["logprobs"]["content"]


def main():
    directory, file = sys.argv[1:]
    server, tokenizer = serve(file), Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    compared, largest = 0, 0.0
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        usage, tokens = go_on(server, text)
        if usage["prompt_tokens"] != len(ids) or [t["id"] for t in tokens] != [t["id"] for t in go_on(server, ids)[1]]:
            sys.exit(f"llama.cpp gives {text!r} other ids than tokenizer.json")
        if len(tokens) != usage["completion_tokens"]:
            print(f"left out, since llama.cpp reports several tokens of one character as one: {text!r}")
            continue
        expected = ours(directory, ids + [token["id"] for token in tokens])[len(ids) - 1 :]
        largest = max(largest, *(abs(token["logprob"] - mine) for token, mine in zip(tokens, expected)))
        compared += len(tokens)
    print(f"llama.cpp: largest difference of {compared} log-probabilities {largest:.3g}")


main()
