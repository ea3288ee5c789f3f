"""The memory check: what is needed, what is available, and the one line between them."""

from __future__ import annotations

import pytest

from quantlab import InputError, quantize_checkpoint
from quantlab.checkpoint import open_checkpoint
from quantlab.generation import memory
from quantlab.generation.decoder_description import describe
from quantlab.generation.memory import Need, available_memory, check_memory, needed_memory
from quantlab.generation.native_engine import load_native


def need_of(folder, context: int = 128, kv: str = "f16") -> Need:
    checkpoint = open_checkpoint(folder)
    return needed_memory(checkpoint, describe(checkpoint.config, "config"), context, kv)


def test_the_estimate_is_what_the_core_takes(make_model, tmp_path):
    make_model(tmp_path / "float", "llama", head_dim=32)
    quantize_checkpoint(tmp_path / "float", tmp_path / "packed")
    for kv, elements in (("f32", 4), ("f16", 2), ("q8_0", 34 / 32)):
        engine = load_native(tmp_path / "packed", context=100, kv=kv, threads=1)
        need = need_of(tmp_path / "packed", 100, kv)
        assert need.cache == 2 * 2 * 2 * 32 * 112 * elements  # both, layers, heads, columns, whole tiles of 16
        engine.prefill([3] * 100)
        assert engine._decoder.cache_bytes(100) == need.cache
        norms, embedding = 5 * 64 * 4, 512 * 64 / 32 * 20
        assert need.weights == engine.weight_bytes + norms + (0 if engine_is_tied(tmp_path / "packed") else embedding)


def engine_is_tied(folder) -> bool:
    return open_checkpoint(folder).tied


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(make_model, tmp_path, monkeypatch):
    make_model(tmp_path / "model", "llama")
    need = need_of(tmp_path / "model")
    monkeypatch.setattr(memory, "available_memory", lambda: need.total)
    assert load_native(tmp_path / "model").context == 128
    monkeypatch.setattr(memory, "available_memory", lambda: need.total - 1)
    monkeypatch.setattr("quantlab.native.PackedMatrix", None)
    with pytest.raises(InputError, match=r"model: 0\.\d+ GB of memory needed .*; choose a smaller context or kv q8_0"):
        load_native(tmp_path / "model")


def test_messages(monkeypatch):
    need = Need(weights=13_100_000_000, cache=1_000_000_000, scratch=40_000_000)
    monkeypatch.setattr(memory, "available_memory", lambda: 13_900_000_000)
    figures = r"M: 14\.1 GB of memory needed \(weights 13\.1 GB, cache 1 GB\), "
    with pytest.raises(InputError, match=figures + r"13\.9 GB available; choose a smaller context or kv q8_0$"):
        check_memory("M", need)
    monkeypatch.setattr(memory, "available_memory", lambda: 8_000_000_000)
    with pytest.raises(InputError, match=figures + r"8 GB available; the weights alone do not fit: quantize to fewer"):
        check_memory("M", need)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    check_memory("M", need)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a made-up system."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_a_system_that_tells_nothing(system):
    assert available_memory() is None


def test_what_the_kernel_says_is_available(system):
    system(proc__meminfo="MemTotal:  100 kB\nMemFree:   10 kB\nMemAvailable:   64 kB\n")
    assert available_memory() == 64 * 1024


def test_a_control_groups_limit_at_any_level(system):
    system(proc__meminfo="MemAvailable:   1000 kB\n", proc__self__cgroup="0::/outer/inner\n")
    system(cgroup__outer__inner__memory_DOT_max="max\n", cgroup__outer__inner__memory_DOT_current="500\n")
    assert available_memory() == 1000 * 1024
    system(cgroup__outer__memory_DOT_max="9000\n", cgroup__outer__memory_DOT_current="5000\n")
    assert available_memory() == 4000
    system(cgroup__outer__memory_DOT_stat="anon 1\ninactive_file 300\n")
    assert available_memory() == 4300
    system(cgroup__outer__memory_DOT_current="9900\n")
    assert available_memory() == 0


def test_a_limit_of_the_first_version(system):
    system(proc__self__cgroup="12:cpu,cpuacct:/\n3:memory:/box\n")
    system(cgroup__memory__box__memory_DOT_limit_in_bytes="9000\n")
    system(cgroup__memory__box__memory_DOT_usage_in_bytes="1000\n")
    assert available_memory() == 8000
