"""Caches in a folder: what another process computed of a prompt's beginning is reused, with the bits of a cold run."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlab import quantize_checkpoint
from quantlab.errors import InputError
from quantlab.generation import prompt_cache
from quantlab.generation.native_engine import NativeEngine, load_native
from quantlab.generation.prompt_cache import PromptCache
from quantlab.generation.sampling import SamplingParams
from quantlab.generation.saved_cache import write_to


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 512, count).tolist()


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny packed Llama with heads that a q8_0 cache takes."""
    folder = tmp_path_factory.mktemp("cached")
    make_model(folder / "float", "llama", head_dim=32, max_position_embeddings=512)
    quantize_checkpoint(folder / "float", folder / "packed")
    return folder / "packed"


def engine_of(model: Path, folder: Path, size: int = 1 << 30, **arguments: object) -> NativeEngine:
    engine = load_native(model, **{"threads": 1, **arguments})
    engine.prompt_cache = PromptCache(folder, size)
    return engine


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def cold_logits(model: Path, ids: list[int], **arguments: object) -> np.ndarray:
    engine = load_native(model, **{"threads": 1, **arguments})
    engine.prefill(ids)
    return engine.logits()


@pytest.mark.parametrize("kv", ["f16", "f32", "q8_0"])
def test_a_restored_prompt_has_the_bits_of_a_cold_run(model: Path, tmp_path: Path, kv: str) -> None:
    ids = tokens(200)
    assert engine_of(model, tmp_path, kv=kv).prefill(ids) == 0
    engine = engine_of(model, tmp_path, kv=kv, threads=2, context=201)
    assert engine.prefill(ids) == 199  # the last one's logits are not stored
    assert np.array_equal(engine.logits(), cold_logits(model, ids, kv=kv))
    drawn = list(engine.decode(SamplingParams(), 1))
    assert drawn


@pytest.mark.parametrize(
    ("shared", "found"),
    [(200, 200), (140, 140), (136, 136), (135, 128), (127, 127), (64, 64), (63, 63), (17, 17), (8, 8), (7, 0)],
)
def test_a_sequence_that_shares_its_beginning_gives_that(model: Path, tmp_path: Path, shared: int, found: int) -> None:
    """To the token, inside blocks too; less than eight tokens of a block are computed sooner."""
    ids = tokens(200)
    engine_of(model, tmp_path).prefill(ids)
    other = [*ids[:shared], (ids[shared] + 1) % 512 if shared < 200 else 5, *tokens(40, seed=1)]
    engine = engine_of(model, tmp_path)
    assert engine.prefill(other) == found
    assert np.array_equal(engine.logits(), cold_logits(model, other))


def test_a_shorter_prompt_needs_a_shorter_context(model: Path, tmp_path: Path) -> None:
    """Than the stored block has tokens."""
    ids = tokens(128)
    engine_of(model, tmp_path).prefill(ids)
    for length in (100, 40):
        engine = engine_of(model, tmp_path, context=length)
        assert engine.prefill(ids[:length]) == length - 1
        assert np.array_equal(engine.logits(), cold_logits(model, ids[:length]))
    assert engine_of(model, tmp_path).prefill(ids) == 127  # nothing was taken for damaged


def test_the_longest_of_many_is_taken(model: Path, tmp_path: Path) -> None:
    """Also where they part in the middle of a block, and beyond what the engine has itself."""
    ids = tokens(180)
    for length in (90, 150, 110):
        engine_of(model, tmp_path).prefill(ids[:length] + tokens(30, seed=length))
    engine = engine_of(model, tmp_path)
    engine.prefill(ids[:70])
    assert engine.prefill(ids) == 150
    assert np.array_equal(engine.logits(), cold_logits(model, ids))


@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prompts_in_any_order(model: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Prompts that begin alike, by two engines in turns, in a folder too small for all: the bits of cold runs."""
    engines = [engine_of(model, tmp_path, size=150_000) for _ in range(2)]
    stem = tokens(160)
    for _ in range(data.draw(st.integers(2, 4))):
        cut, tail = data.draw(st.integers(0, 160)), data.draw(st.integers(1, 70))
        ids = stem[:cut] + tokens(tail, seed=data.draw(st.integers(0, 2)))
        engine = data.draw(st.sampled_from(engines))
        engine.prefill(ids)
        assert np.array_equal(engine.logits(), cold_logits(model, ids))
        assert sum(path.stat().st_size for path in blocks(tmp_path)) <= 150_000


def test_sequences_share_what_they_begin_with(model: Path, tmp_path: Path) -> None:
    """Blocks of 64: a second sequence adds those it does not share; a longer one replaces the last, shorter block."""
    head = tokens(128)
    engine = engine_of(model, tmp_path)
    engine.prefill(head + tokens(20, seed=1))
    assert len(blocks(tmp_path)) == 3
    engine.prefill(head + tokens(20, seed=2))
    assert len(blocks(tmp_path)) == 4
    engine.prefill(head + tokens(30, seed=2))  # begins with other tokens than seed 2's first 20
    before = len(blocks(tmp_path))
    engine.prefill(engine.tokens + tokens(10, seed=3))
    assert len(blocks(tmp_path)) == before
    written = {path: path.stat().st_ino for path in blocks(tmp_path)}
    engine.prefill(head + tokens(20, seed=1))
    assert {path: path.stat().st_ino for path in blocks(tmp_path)} == written


def test_what_was_generated_is_kept_when_asked(model: Path, tmp_path: Path) -> None:
    engine = engine_of(model, tmp_path)
    engine.prefill(tokens(60))
    drawn = list(engine.decode(SamplingParams(seed=2), 30))
    assert len(blocks(tmp_path)) == 1
    engine.keep()
    assert len(blocks(tmp_path)) == 2
    assert engine_of(model, tmp_path).prefill(tokens(60) + drawn) == 89


def test_a_few_tokens_are_not_worth_a_file(model: Path, tmp_path: Path) -> None:
    engine = engine_of(model, tmp_path)
    engine.prefill(tokens(31))
    assert not blocks(tmp_path)
    engine.prefill(tokens(32))
    assert len(blocks(tmp_path)) == 1


def test_unlike_blocks_are_not_opened(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of many prompts is looked up by names; headers are read of blocks that begin with the same tokens."""
    engine = engine_of(model, tmp_path)
    for seed in range(5):
        engine.prefill(tokens(40, seed))
    opened: list[Path] = []
    read = prompt_cache.read_tokens
    monkeypatch.setattr(prompt_cache, "read_tokens", lambda path, part: opened.append(path) or read(path, part))
    assert engine_of(model, tmp_path).prefill(tokens(40, 7)) == 0
    assert not opened
    assert engine_of(model, tmp_path).prefill(tokens(20, 3) + tokens(20, 8)) == 20
    assert len(set(opened)) == 1


def test_other_models_and_types_are_misses(
    model: Path, tmp_path: Path, make_model: Callable[..., Path], llama_model: Path
) -> None:
    ids = tokens(100)
    engine_of(model, tmp_path / "cache").prefill(ids)
    make_model(tmp_path / "other", "llama", head_dim=32, seed=3, max_position_embeddings=512)
    for other in (
        engine_of(tmp_path / "other", tmp_path / "cache"),
        engine_of(llama_model, tmp_path / "cache"),
        engine_of(model, tmp_path / "cache", kv="f32"),
        engine_of(model, tmp_path / "cache", activations="f32"),
    ):
        assert other.prefill(ids) == 0
        assert other.prefill(ids) == 99
    assert engine_of(model, tmp_path / "cache").prefill(ids) == 99


def test_longrope_counts_positions_by_the_context(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """A text that may become longer than the original context has other angles from its first token on."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 128,
    }
    make_model(
        tmp_path / "phi",
        "phi3",
        rope_parameters=scaling,
        original_max_position_embeddings=128,
        max_position_embeddings=512,
    )
    ids = tokens(100)
    engine_of(tmp_path / "phi", tmp_path / "cache", context=120).prefill(ids)
    engine = engine_of(tmp_path / "phi", tmp_path / "cache", context=300)
    assert engine.prefill(ids) == 0
    assert engine_of(tmp_path / "phi", tmp_path / "cache", context=110).prefill(ids) == 99


@pytest.mark.parametrize("where", [3, 12, 60, -5])
def test_damage_anywhere_is_a_miss_that_mends_itself(model: Path, tmp_path: Path, where: int) -> None:
    """The blocks before it still count, and it is written anew."""
    ids = tokens(200)
    engine_of(model, tmp_path).prefill(ids)
    damaged = next(path for path in blocks(tmp_path) if path.name.startswith("000000128"))
    content = bytearray(damaged.read_bytes())
    content[where] ^= 0x20
    damaged.write_bytes(content)
    engine = engine_of(model, tmp_path)
    assert engine.prefill(ids) == 128
    assert np.array_equal(engine.logits(), cold_logits(model, ids))
    assert engine_of(model, tmp_path).prefill(ids) == 199


@pytest.mark.parametrize("content", [b"", b"something else", None], ids=["empty", "foreign", "cut"])
def test_a_file_in_our_name_that_is_none_of_ours(model: Path, tmp_path: Path, content: bytes | None) -> None:
    ids = tokens(100)
    engine_of(model, tmp_path).prefill(ids)
    for path in blocks(tmp_path):
        path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    assert [engine_of(model, tmp_path).prefill(ids) for _ in range(3)] == [0, 64, 99]  # found and mended one by one


@pytest.mark.parametrize("token", [1 << 40, -1, True, 2.0])
def test_a_file_of_impossible_tokens_is_a_miss(model: Path, tmp_path: Path, token: int) -> None:
    """Also where it looks whole."""
    ids = tokens(100)
    engine_of(model, tmp_path).prefill(ids)
    for path in blocks(tmp_path):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(16)[8:])[0]))
            cache = np.fromfile(file, np.uint8)
        about = {name: value for name, value in header.items() if name not in ("tokens", "bytes", "sha256")}
        with path.open("wb") as file:
            write_to(file, about, [*header["tokens"][:-1], token], cache)
    engine = engine_of(model, tmp_path)
    assert engine.prefill([*ids[:40], *ids[:40]]) == 0
    assert np.array_equal(engine.logits(), cold_logits(model, [*ids[:40], *ids[:40]]))


def test_other_files_stay_untouched(model: Path, tmp_path: Path) -> None:
    """However small the folder may be; unfinished files of the living too, the dead's go."""
    names = ["notes.txt", "000000000-0-0.cache", f".{0:09d}-{'0' * 32}-{'0' * 8}-{'0' * 32}.cache.{'0' * 16}.partial"]
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / f"{0:09d}-{'0' * 32}-{'0' * 8}-{'1' * 32}.cache").mkdir()
    engine = engine_of(model, tmp_path, size=1)
    engine.prefill(tokens(100))
    assert [path.name for path in blocks(tmp_path) if path.is_file()] == sorted(names)
    os.utime(tmp_path / names[2], (0, time.time() - 7200))
    engine.prefill(tokens(100, seed=1))
    assert [path.name for path in blocks(tmp_path) if path.is_file()] == sorted(names[:2])


def test_the_least_recently_used_go_first(model: Path, tmp_path: Path) -> None:
    """Ends of sequences before their beginnings."""
    engine = engine_of(model, tmp_path)
    for seed in (1, 2):
        engine.prefill(tokens(128, seed))
    size = sum(path.stat().st_size for path in blocks(tmp_path))
    engine.prefill([*tokens(128, 1), 9])  # used again
    engine = engine_of(model, tmp_path, size=size + 1000)
    engine.prefill(tokens(64, 3))
    assert engine_of(model, tmp_path).prefill(tokens(128, 2)) in (64, 0)
    assert engine_of(model, tmp_path).prefill(tokens(128, 1)) == 127


def test_a_folder_that_cannot_be_written_is_told_of(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer is not lost for it, and nothing unfinished stays."""
    engine = engine_of(model, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quantlab.generation.prompt_cache.write_to", full)
    assert engine.prefill(tokens(100)) == 0
    assert "the prompt cache is not written: No space left on device" in caplog.text
    assert not blocks(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="no folder for a prompt cache: "):
            PromptCache(folder)
    with pytest.raises(InputError, match="a prompt cache of 0 bytes"):
        PromptCache(tmp_path, 0)
    assert PromptCache(tmp_path / "new" / "folder").folder.is_dir()


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_prompt_cache import engine_of, tokens
engine = engine_of(Path(sys.argv[1]), Path(sys.argv[2]), size=250_000)
for round in range(30):
    engine.prefill(tokens(64) + tokens(150, seed=round % 4))
    engine.rewind(0)
"""


def test_two_processes_at_once(model: Path, tmp_path: Path) -> None:
    """They write and remove the same files; both end well, and what is left is whole."""
    command = [sys.executable, "-c", WRITER, str(model), str(tmp_path), str(Path(__file__).parent)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert all(path.suffix == ".cache" for path in blocks(tmp_path))
    for seed in range(4):
        ids = tokens(64) + tokens(150, seed=seed)
        engine = engine_of(model, tmp_path)
        engine.prefill(ids)
        assert np.array_equal(engine.logits(), cold_logits(model, ids))
