"""The memory limit: what is planned, what is refused, and what a process really takes."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from streamed_models import CONFIG, config_of, save_model, shapes, stored, write_model

from quantlab import merge_checkpoints
from quantlab.checkpoint.byte_sizes import bytes_of
from quantlab.errors import InputError
from quantlab.merging import memory
from quantlab.merging.memory import MemoryPlan, TensorWork
from quantlab.merging.plan_types import TensorPlan
from quantlab.merging.streaming import _in_memory
from quantlab.merging.tensor_merge import MergedTensor

# Runs a merge under a limit that the system keeps, and tells how much was resident, and how much data there was before.
LIMITED = """
import resource, sys
from pathlib import Path
import torch
import quantlab.merging.merge
from quantlab.merging.memory import data_bytes
torch.zeros(8).bfloat16().float()
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = data_bytes()
report = quantlab.merging.merge.merge_checkpoints(Path(sys.argv[1]), Path(sys.argv[2]), max_ram=limit, threads=2)
print(before, report.memory_bytes, next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GB", 2e9), ("500M", 5e8), ("1.5GiB", 1.5 * 2**30), ("800 kb", 8e5), ("123456789", 123456789)],
)
def test_sizes(text, expected):
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "2 XB", "-1GB", "0", "GB", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="is no size; write it as 2GB"):
        bytes_of(text)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two models of 100 MB each."""
    root = tmp_path_factory.mktemp("large")
    sizes = {"width": 1024, "inner": 4096, "layers": 2, "vocabulary": 20000}
    config = {
        **CONFIG,
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["inner"],
        "vocab_size": sizes["vocabulary"],
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    }
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(1 << 20, generator=generator).bfloat16()
    models = []
    for number, name in enumerate(("base", "a", "b")):
        tensors = {
            key: some.roll(1000 * number + place).repeat(-(-_size(shape) // len(some)))[: _size(shape)].reshape(shape)
            for place, (key, shape) in enumerate(shapes(**sizes).items())
        }
        models.append(save_model(root / name, tensors, config))
    assert models[0].joinpath("model.safetensors").stat().st_size > 100e6
    return models


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts anonymous mappings on Linux only")
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_of_300_mb_within_a_limit_of_the_system(method, large, tmp_path):
    """The models are larger than what the limit leaves: the process starts with almost 200 MB of data."""
    base, *models = large
    if method == "linear":
        text = config_of("linear", *large, weight=1)
    else:
        text = config_of("ties", *models, base=base, density=0.2, weight=1)
    (tmp_path / "config.yml").write_text(text)
    limit = 420_000_000
    command = [sys.executable, "-c", LIMITED, tmp_path / "config.yml", tmp_path / "out", limit]
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    before, planned, resident = map(int, ended.stdout.split())
    assert before + 3 * 100e6 > limit
    assert planned <= limit
    assert resident * 1024 < limit + 150e6  # files of libraries are resident too, and count for no data
    merge_checkpoints(text, tmp_path / "expected", threads=1)
    assert stored(tmp_path / "out") == stored(tmp_path / "expected")


def test_a_limit_below_what_is_needed_is_refused_with_the_figure(tmp_path):
    base = write_model(tmp_path / "base", 0)
    text = config_of("iso_c", write_model(tmp_path / "a", 1, start=base), base=base)
    with pytest.raises(InputError, match=r"--max-ram 0\.10GB: iso_c needs") as refused:
        merge_checkpoints(text, tmp_path / "out", max_ram=10**8)
    named = re.search(r"needs ([0-9.]+GB) for model\.\S+ \[\d+, \d+\] of 1 models at once; allow", str(refused.value))
    assert named is not None
    enough = bytes_of(named[1]) + 30_000_000  # what this process takes in the meantime
    assert merge_checkpoints(text, tmp_path / "out", max_ram=enough).memory_bytes <= enough
    assert {path.name for path in tmp_path.iterdir()} == {"base", "a", "out"}


def test_without_a_limit_other_data_of_the_process_leaves_room(monkeypatch):
    for held, limit in ((0, 2_000_000_000), (1_000_000_000, 2_000_000_000), (5_000_000_000, 6_000_000_000)):
        monkeypatch.setattr(memory, "data_bytes", lambda held=held: held)
        assert memory.limit_of(None) == limit
        assert memory.limit_of("500MB") == memory.limit_of(500_000_000) == 500_000_000


def test_tensors_take_turns_where_memory_is_for_one():
    """Those that do not fit side by side wait for each other, and smaller ones are taken first."""
    plans = [TensorPlan(str(size), (size,), "F32", "linear", None, (), {}) for size in (6, 6, 3, 12, 1)]
    works = [TensorWork(plan, 1, plan.shape[0]) for plan in plans]
    running, most, lock = [], [], threading.Lock()

    def merged(work: TensorWork) -> MergedTensor:
        with lock:
            running.append(work.nbytes)
            most.append(list(running))
        time.sleep(0.02)
        with lock:
            running.remove(work.nbytes)
        return MergedTensor(work.plan.name, "merged", 0.0)

    with ThreadPoolExecutor(2) as workers:
        done = list(_in_memory(works, MemoryPlan(tuple(works), 2, 10, 0), lambda work: workers.submit(merged, work)))
    assert sorted(tensor.name for tensor in done) == ["1", "12", "3", "6", "6"]
    assert all(sum(sizes) <= 10 or len(sizes) == 1 for sizes in most)
    assert [6, 3] in most
