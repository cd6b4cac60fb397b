"""What `trace` costs as models grow: time and peak memory, each in a process of its own.

`pytest -n 0 -s tests/benchmarks/test_trace_speed.py`, on idle cores. Nothing here asserts a time.
"""

import json
import subprocess
import sys

import pandas as pd
import pytest

SIZES = [(256, 4), (256, 16), (1024, 4), (1024, 16)]

RUN = """
import json, resource, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import bilinear_lens as bl

width, layers, prompt = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "prompt"
torch.manual_seed(0)
config = LlamaConfig(vocab_size=4096, hidden_size=width, intermediate_size=2 * width,
    num_hidden_layers=layers, num_attention_heads=width // 64, hidden_act="linear")
model = bl.HookedBilinearTransformer.from_hf(LlamaForCausalLM(config))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before, start = peak(), time.perf_counter()
tokens = torch.randint(4096, (32,)) if prompt else None
circuit = bl.trace(model, 7, prompt=tokens, width=8, depth=4)
print(json.dumps({
    "width": width, "layers": layers, "of": "a prompt" if prompt else "weights",
    "nodes": len(circuit.found) - 1, "seconds": time.perf_counter() - start,
    "GiB before": before, "GiB more": peak() - before,
}))
"""


@pytest.mark.parametrize("kind", ["weights", "prompt"])
def test_what_a_trace_costs(kind):
    rows = []
    for width, layers in SIZES:
        command = [sys.executable, "-c", RUN, str(width), str(layers), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    table = pd.DataFrame(rows).round(2).to_string(index=False)
    print(f"\ntrace, width 8, depth 4, 4,096 tokens\n{table}")
    assert all(row["nodes"] > 8 for row in rows)
