"""One block at a time computes what the whole model does, and sees the inputs that hooks on the whole model see."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlab import InputError, load_model, open_checkpoint, quantize_checkpoint
from quantlab.calibration import block_pass, collection
from quantlab.calibration.activations import ActivationFile
from quantlab.calibration.batches import Batch, batches_of
from quantlab.calibration.block_pass import BlockPass
from quantlab.calibration.streamed_model import Activations, StreamedModel

FAMILIES = ("llama", "gpt2", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3", "gemma2", "gemma3_text")
LENGTHS = (64, 64, 50, 31, 9)  # longer than the sliding windows of 8
GROUPS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}


@pytest.fixture(scope="module")
def windows() -> list[tuple[int, ...]]:
    draw = np.random.default_rng(0)
    return [tuple(draw.integers(3, 512, length).tolist()) for length in LENGTHS]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


class Streamed:
    """A streamed model and its activations, block by block."""

    def __init__(
        self, folder: Path, windows: list[tuple[int, ...]], work: Path, activations: Activations = "float"
    ) -> None:
        self.checkpoint = open_checkpoint(folder)
        self.model = StreamedModel(self.checkpoint, activations=activations)
        self.batches: list[Batch] = batches_of(windows, 64)
        self._work = work

    def blocks(self) -> Iterator[tuple[int, ActivationFile, ActivationFile]]:
        """Each block, loaded, with its inputs and the file for its outputs."""
        table = self.checkpoint.read(self.checkpoint.family.embedding, torch.float32)
        with self._file(0) as hidden:
            for number, states in enumerate(self.model.embed(self.batches, lambda ids: table[ids])):
                hidden.write(number, states)
        for index in range(self.model.blocks):
            self.model.load_block(index)
            with self._file(index) as hidden, self._file(index + 1) as outputs:
                yield index, hidden, outputs
            self.model.release(self.model.block_names(index))

    def run_block(self, index: int, hidden: ActivationFile, outputs: ActivationFile) -> None:
        with BlockPass(self.model, index, self.batches, hidden, threads=1) as block:
            block.finish(outputs)

    def last(self) -> ActivationFile:
        return self._file(self.model.blocks)

    def _file(self, index: int) -> ActivationFile:
        path = self._work / f"{index}"
        return ActivationFile(path, self.batches, self.model.width, torch.float32, create=not path.exists())


@torch.inference_mode()
def hooked_moments(folder: Path, windows: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """E[x x^T] of every linear layer's inputs, float64, from transformers' own model, a window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    totals: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def add(module, arguments) -> None:
            rows = arguments[0][0].to(torch.float64)
            totals[name] = totals.get(name, 0) + rows.T @ rows

        return add

    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    for window in windows:
        model(input_ids=torch.tensor([window]), use_cache=False)
    return {name: total / sum(map(len, windows)) for name, total in totals.items()}


def test_it_knows_whose_outputs_are_added_to_the_hidden_states(folder, windows, tmp_path):
    """Two layers of a block, one behind the other or side by side (GPT-NeoX); not where norms stand behind them."""
    streamed = Streamed(folder, windows, tmp_path)
    streamed.model.tells_residual = True
    for index, hidden, outputs in streamed.blocks():
        writers = [name for name in streamed.model.linear_names(index) if streamed.model.is_writer(name)]
        assert len(writers) == 2
        assert streamed.model.adds_up(index, hidden.read(0)) == ("gemma" not in streamed.checkpoint.family.model_type)
        streamed.run_block(index, hidden, outputs)


def test_hidden_states_are_those_of_the_whole_model(folder, windows, tmp_path):
    streamed = Streamed(folder, windows, tmp_path)
    for index, hidden, outputs in streamed.blocks():
        streamed.run_block(index, hidden, outputs)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with streamed.last() as last, torch.inference_mode():
        for number, batch in enumerate(streamed.batches):
            states = streamed.model.final_norm(last.read(number))
            for ids, length, found in zip(batch.ids, batch.lengths, states, strict=True):
                ids = torch.from_numpy(ids[None, :length])
                expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(found[:length], expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_hooks_on_the_whole_model(folder, windows, tmp_path):
    """Whole second moments and their tiles, and the head's inputs: for every layer of every family, masks and padding
    included; whether a batch waits for its layers to be quantized or begins anew.
    """
    expected = hooked_moments(folder, windows)
    streamed = Streamed(folder, windows, tmp_path)
    model, seen = streamed.model, set()
    for index, hidden, outputs in streamed.blocks():
        groups = collection.input_groups(model, index, hidden.read(0))
        with BlockPass(model, index, streamed.batches, hidden, threads=1) as block:
            squares = {group[0]: block.statistics(group[0], full=False) for group in groups}
        block = BlockPass(model, index, streamed.batches, hidden, threads=2)
        for group in groups:
            moment = block.statistics(group[0], full=True)
            assert moment.tokens == squares[group[0]].tokens == sum(LENGTHS)
            assert torch.equal(moment.second_moment, moment.second_moment.T)
            for name in group:
                seen.add(name)
                scale = float(expected[name].diagonal().mean())
                torch.testing.assert_close(moment.second_moment.double(), expected[name], rtol=1e-4, atol=1e-5 * scale)
                torch.testing.assert_close(
                    squares[group[0]].diagonal.double(), expected[name].diagonal(), rtol=1e-4, atol=1e-5 * scale
                )
        block.finish(outputs)
    with streamed.last() as last:
        head = collection.collect_head(model, "head", streamed.batches, last, threads=1, full=True)
    torch.testing.assert_close(head.second_moment.double(), expected["lm_head.weight"], rtol=1e-4, atol=1e-5)
    assert seen == {name for name in expected if name != "lm_head.weight"}


@pytest.mark.parametrize("family", GROUPS)
def test_layers_that_read_the_same_inputs_are_found_in_the_order_of_computation(family, make_model, windows, tmp_path):
    streamed = Streamed(make_model(tmp_path / "model", family), windows, tmp_path)
    blocks = streamed.blocks()
    _, hidden, _ = next(blocks)
    groups = collection.input_groups(streamed.model, 0, hidden.read(0))
    assert [[name.split(".")[-2] for name in group] for group in groups] == GROUPS[family]


def test_only_one_block_has_weights(llama_model, windows, tmp_path):
    streamed = Streamed(llama_model, windows, tmp_path)
    for index, hidden, outputs in streamed.blocks():
        streamed.run_block(index, hidden, outputs)
        loaded = {name for name, p in streamed.model.model.named_parameters() if p.device.type != "meta"}
        assert loaded == {*streamed.model.block_names(index), "model.norm.weight"}


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_the_bits_depend_on_no_threads_and_no_waiting(llama_model, activations, windows, monkeypatch, tmp_path):
    """Of six batches all, none or one wait for the layers."""
    results = []
    for threads, most, waiting in ((1, block_pass.MOST_WAITING, 6), (3, 0, 0), (2, 2_000_000, 1)):
        monkeypatch.setattr(block_pass, "MOST_WAITING", most)
        work = tmp_path / f"{threads}"
        work.mkdir()
        streamed = Streamed(llama_model, windows * 20, work, activations)
        found = []
        for index, hidden, outputs in streamed.blocks():
            groups = collection.input_groups(streamed.model, index, hidden.read(0))
            before = threading.active_count()
            with BlockPass(streamed.model, index, streamed.batches, hidden, threads) as block:
                found += [block.statistics(group[0], full=True).second_moment for group in groups]
                assert threading.active_count() == before + waiting
                block.finish(outputs)
            found += [outputs.read(number) for number in range(len(streamed.batches))]
        results.append(found)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


def test_a_layer_takes_the_weight_that_is_set_while_its_inputs_wait(llama_model, windows, tmp_path):
    """What came before its inputs is not computed again, what comes after sees the new weight."""
    streamed = Streamed(llama_model, windows, tmp_path)
    model, name = streamed.model, "model.layers.0.self_attn.o_proj.weight"
    blocks = streamed.blocks()
    _, hidden, outputs = next(blocks)
    with BlockPass(model, 0, streamed.batches, hidden, threads=2) as block:
        block.statistics(name, full=False)
        model.set_weight("model.layers.0.self_attn.q_proj.weight", torch.full((64, 64), float("nan")))
        model.set_weight(name, torch.zeros(64, 64))
        block.finish(outputs)
    model.load_block(0)
    model.set_weight(name, torch.zeros(64, 64))
    for number in range(len(streamed.batches)):
        assert torch.equal(outputs.read(number), model.forward_block(0, hidden.read(number)))


def test_waiting_passes_end_with_the_block(llama_model, windows, tmp_path):
    streamed, before = Streamed(llama_model, windows, tmp_path), threading.active_count()
    first, last = (f"model.layers.0.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj"))
    blocks = streamed.blocks()
    _, hidden, _ = next(blocks)
    with BlockPass(streamed.model, 0, streamed.batches, hidden, threads=2) as block:
        block.statistics(first, full=False)
        block.statistics(last, full=False)
        assert threading.active_count() == before + len(streamed.batches)
    assert threading.active_count() == before
    with BlockPass(streamed.model, 0, streamed.batches, hidden, threads=2) as block:
        block.statistics(last, full=False)
        with pytest.raises(InputError, match=f"^{first}: the block runs without it$"):
            block.statistics(first, full=False)
    assert threading.active_count() == before


def test_int8_activations_are_those_of_layers_over_q8_0_blocks(folder, windows, tmp_path):
    """Against the whole model, loaded from a folder of such blocks."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"rules: [['{open_checkpoint(folder).family.embedding}', null]]\nbase: q8_0\n")
    quantize_checkpoint(folder, tmp_path / "bytes", recipe=str(recipe))
    model = load_model(tmp_path / "bytes", activations="int8")
    streamed = Streamed(folder, windows, tmp_path, "int8")
    for index, hidden, outputs in streamed.blocks():
        streamed.run_block(index, hidden, outputs)
    with streamed.last() as last, torch.inference_mode():
        for number, batch in enumerate(streamed.batches):
            for ids, length, found in zip(batch.ids, batch.lengths, last.read(number), strict=True):
                ids = torch.from_numpy(ids[None, :length])
                expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(streamed.model.final_norm(found[:length]), expected, rtol=1e-4, atol=1e-5)


def test_batches_hold_every_window_once_padded_to_few_lengths(windows):
    batches = batches_of([*windows, *windows], 64)
    assert {batch.shape[1] for batch in batches} == {64, 32, 16}
    found = [tuple(ids[:n].tolist()) for batch in batches for ids, n in zip(batch.ids, batch.lengths, strict=True)]
    assert sorted(found) == sorted([*windows, *windows])
    assert [int(batch.counted.sum()) for batch in batches] == [batch.tokens for batch in batches]


def test_inputs_that_are_not_finite_are_named(llama_model, windows, tmp_path):
    streamed = Streamed(llama_model, windows, tmp_path)
    blocks = streamed.blocks()
    _, hidden, _ = next(blocks)
    broken = hidden.read(0)
    broken[0, 3, 5] = float("nan")
    hidden.write(0, broken)
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(InputError, match=f"{name}: its inputs are NaN or infinite on the calibration text"):
        BlockPass(streamed.model, 0, streamed.batches, hidden, threads=1).statistics(name, full=True)


@pytest.mark.parametrize("columns", [32, 512, 1100, 1120])
def test_second_moments_are_sums_over_counted_tokens(columns):
    """Also where they are put together from panels, the last of them narrow."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 40, columns, generator=generator)
    batch = Batch(np.zeros((2, 40), np.int64), (40, 17))  # 57 tokens
    rows = torch.cat([inputs[0], inputs[1, :17]]).double()
    moment = collection.measured("x", lambda _: inputs, [batch] * 9, columns, threads=2, full=True).second_moment * 57
    torch.testing.assert_close(moment.double(), rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert torch.equal(moment, moment.T)
    tiles = collection.tiles(inputs, batch)
    if columns % 32:
        torch.testing.assert_close(tiles.double(), rows.square().sum(dim=0), rtol=1e-5, atol=0)
        return
    assert torch.equal(tiles, tiles.transpose(1, 2))
    for i, tile in enumerate(tiles):
        part = slice(32 * i, 32 * i + 32)
        torch.testing.assert_close(tile, moment[part, part], rtol=1e-4, atol=1e-3)
