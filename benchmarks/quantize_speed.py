"""Time and memory of quantizing a 1.1 B Llama-shaped fp16 checkpoint to Q4_1, side by side with llama.cpp's quantizer.

    python benchmarks/quantize_speed.py WORK_FOLDER [--repeat 3] [--threads 2] [--llama-quantize PROGRAM]

Random weights in TinyLlama's shape (2.2 GB) are made once in WORK_FOLDER, which needs 6 GB. Each round then runs, one
after the other: `quantlab quantize` to a folder, `quantlab quantize` to a GGUF file, llama.cpp (llama-cpp-python's
library call, timed inside the process, or the program given) from the fp16 GGUF file to Q4_1 with embedding and head in
Q8_0, as ours are. Files are in the page cache for both sides. Ours is the time of the whole command, start-up included;
anonymous memory is the largest RssAnon (/proc) seen while it ran, sampled every 10 ms.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantlab.cli.console import print_table

from quantlab.checkpoint import TensorEntry
from quantlab.checkpoint.export import export_checkpoint
from quantlab.checkpoint.folder_writer import FolderWriter
from quantlab.checkpoint.tensors import torch_dtype

TOKENIZER = Path(__file__).parents[1] / "models" / "fable-9m"
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float16", "hidden_size": 2048,
    "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "vocab_size": 32000, "hidden_act": "silu",
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA_CALL = """
import ctypes, sys, time, llama_cpp
p = llama_cpp.llama_model_quantize_default_params()
p.nthread, p.ftype, p.output_tensor_type, p.token_embedding_type = int(sys.argv[3]), 3, 8, 8
started = time.perf_counter()
status = llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p))
print("seconds", time.perf_counter() - started)
sys.exit(status)
"""


def main() -> None:
    """Parse, make the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-quantize", type=Path)
    arguments = parser.parse_args()
    work, threads = arguments.work, arguments.threads
    source, gguf = work / "float16", work / "float16.gguf"
    if not source.exists():
        make_model(source)
    if not gguf.exists():
        export_checkpoint(source, gguf, "gguf")
    results: dict[str, list[tuple[float, float]]] = {"folder": [], "GGUF": [], "llama.cpp": []}
    for _ in range(arguments.repeat):
        results["folder"].append(run_ours(source, work / "out-folder", threads))
        results["GGUF"].append(run_ours(source, work / "out.gguf", threads))
        results["llama.cpp"].append(run_theirs(arguments.llama_quantize, gguf, work / "theirs.gguf", threads))
    print_results(results)


def make_model(folder: Path, config: Mapping[str, Any] = CONFIG, dtype: str = "F16") -> None:
    """Random normal weights, standard deviation 0.02, stored as `dtype`, and a real tokenizer."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        rows = {"q": hidden, "k": keys, "v": keys, "o": hidden}
        for name, size in rows.items():
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (size, hidden)
        for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
        for name in ("input", "post_attention"):
            shapes[f"model.layers.{layer}.{name}_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    entries = [TensorEntry(name, dtype, shape) for name, shape in shapes.items()]
    random = np.random.default_rng(0)
    with FolderWriter(folder, entries, config) as writer:
        writer.copy_companions(TOKENIZER)
        for entry in entries:
            values = random.standard_normal(entry.elements, dtype=np.float32) * np.float32(0.02)
            weights = torch.from_numpy(values).to(torch_dtype(dtype)).reshape(entry.shape)
            writer.write(entry.name, weights)


def run_ours(source: Path, out: Path, threads: int) -> tuple[float, float]:
    """Seconds and peak anonymous bytes of the whole command."""
    remove(out)
    command = [
        sys.executable,
        "-m",
        "quantlab.cli",
        "quantize",
        str(source),
        str(out),
        "--threads",
        str(threads),
        "--json",
    ]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return seconds, peak


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a running process; 0 when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def run_theirs(program: Path | None, source: Path, out: Path, threads: int) -> tuple[float, float]:
    """Seconds of llama.cpp's quantizer."""
    remove(out)
    if program is not None:
        types = ["--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"]
        command = [str(program), *types, str(source), str(out), "q4_1", str(threads)]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - started, 0
    command = [sys.executable, "-c", LLAMA_CALL, str(source), str(out), str(threads)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(text.split("seconds")[1]), 0


def remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def print_results(results: dict[str, list[tuple[float, float]]]) -> None:
    """One row a side, ratios to llama.cpp's median."""
    base = statistics.median(seconds for seconds, _ in results["llama.cpp"])
    rows = []
    for side, runs in results.items():
        seconds = [s for s, _ in runs]
        median, peak = statistics.median(seconds), max(p for _, p in runs)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        rows.append((side, f"{median:.2f}", spread, f"{median / base:.2f}", f"{peak / 1e6:.0f} MB" if peak else ""))
    print_table(("to Q4_1", "median s", "spread", "ratio", "peak anonymous memory"), rows)
    print(f"\n{len(next(iter(results.values())))} rounds; {platform.machine()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
