"""What runs of gptq measure of the drift from the original, and what correcting it is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from quantlab import load_model, open_checkpoint
from quantlab.calibration.samples import open_calibration
from quantlab.calibration.statistics_file import StatisticsFile

WRITERS = ("o_proj.weight", "down_proj.weight", "c_proj.weight")
NORMS = {
    "self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm",
    "attn.c_proj": "ln_1", "mlp.c_proj": "ln_2",
}  # fmt: skip


def hooked_inputs(model: torch.nn.Module, windows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """By linear weight, float64 [tokens, in]."""
    found = read_by(model, windows, lambda _, module: isinstance(module, torch.nn.Linear | Conv1D))
    return {f"{name}.weight": rows for name, rows in found.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gptq_measures_how_far_inputs_drifted_from_the_originals(family, make_model, quantize, request_, tmp_path):
    """Gemma's outputs pass norms before hidden states get them: of all its layers the inputs' drift is told."""
    path = tmp_path / "statistics.safetensors"
    original = make_model(tmp_path / "original", family, tied=False)
    quantize(original, tmp_path / "out", "gptq", levels=4, activations="float", statistics_out=path)
    windows = open_calibration(open_checkpoint(original), request_).windows
    here, there = (hooked_inputs(load_model(folder), windows) for folder in (tmp_path / "out", original))
    file = StatisticsFile(path)
    for name in here.keys() - {"lm_head.weight"}:
        found = file.statistics(name)
        added = family == "llama" and name.endswith(WRITERS)
        assert (found.output_drift is not None) == added
        if added:
            assert found.drift is None
        else:
            close(found.drift, (there[name] - here[name]).T @ here[name] / len(here[name]))
    assert not file.statistics("lm_head.weight").knows_drift


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gptq_measures_how_far_the_hidden_states_drifted(family, make_model, quantize, request_, tmp_path):
    """What the attention's outputs are added to are the block's inputs, for the layer at the end of the MLP what the
    second norm reads.
    """
    path = tmp_path / "statistics.safetensors"
    original = make_model(tmp_path / "original", family, tied=False)
    quantize(original, tmp_path / "out", "gptq", levels=4, activations="float", statistics_out=path)
    checkpoint = open_checkpoint(original)
    windows = open_calibration(checkpoint, request_).windows
    here, there = (
        hooked_inputs(load_model(folder), windows) | normalized(load_model(folder), windows)
        for folder in (tmp_path / "out", original)
    )
    file = StatisticsFile(path)
    writers = [name for name in file.layers if name.endswith(WRITERS)]
    assert len(writers) == 4
    for name in writers:
        norm = NORMS[name.split(".", 3)[-1].removesuffix(".weight")]
        at = ".".join([*name.split(".")[:3], norm])
        weight = checkpoint.read(name, torch.float32).double()
        apart = there[at] - here[at] + (there[name] - here[name]) @ weight.T
        close(file.statistics(name).output_drift, apart.T @ here[name] / len(here[name]))


def normalized(model: torch.nn.Module, windows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """What each norm reads, float64 [tokens, width]."""
    return read_by(model, windows, lambda name, _: name.rpartition(".")[2] in NORMS.values())


def read_by(
    model: torch.nn.Module, windows: Sequence[Sequence[int]], wanted: Callable[[str, torch.nn.Module], bool]
) -> dict[str, torch.Tensor]:
    """By name, what modules read, float64 [tokens, in]."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if wanted(name, module):
            module.register_forward_pre_hook(
                lambda _, given, name=name: found.setdefault(name, []).append(given[0][0].double())
            )
    with torch.inference_mode():
        for window in windows:
            model(input_ids=torch.tensor([window]), use_cache=False)
    return {name: torch.cat(parts) for name, parts in found.items()}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_correcting_the_drift_brings_predictions_closer(untied, quantize, request_, tmp_path):
    windows = open_calibration(open_checkpoint(untied), request_).windows
    original = hooked_inputs(load_model(untied), windows)["lm_head.weight"]
    lost = {}
    for chosen in (True, False):
        out = tmp_path / str(chosen)
        quantize(untied, out, "gptq", levels=4, method_options={"correct_drift": chosen})
        lost[chosen] = float((hooked_inputs(load_model(out), windows)["lm_head.weight"] - original).norm())
    assert lost[True] < 0.95 * lost[False]
