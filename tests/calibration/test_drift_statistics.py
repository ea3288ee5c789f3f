"""What runs of gptq measure of the drift from the original, and what correcting it is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quantlab import load_model, open_checkpoint
from quantlab.calibration.samples import open_calibration
from quantlab.calibration.statistics_file import StatisticsFile


def hooked_inputs(model: torch.nn.Module, windows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """By linear weight, float64 [tokens, in]."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, given, name=name: found.setdefault(f"{name}.weight", []).append(given[0][0].double())
            )
    with torch.inference_mode():
        for window in windows:
            model(input_ids=torch.tensor([window]), use_cache=False)
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_gptq_measures_how_far_inputs_drifted_from_the_originals(untied, quantize, request_, tmp_path):
    path = tmp_path / "statistics.safetensors"
    quantize(untied, tmp_path / "out", "gptq", levels=4, activations="float", statistics_out=path)
    windows = open_calibration(open_checkpoint(untied), request_).windows
    here, there = (hooked_inputs(load_model(folder), windows) for folder in (tmp_path / "out", untied))
    file = StatisticsFile(path)
    for name in here.keys() - {"lm_head.weight"}:
        found = file.statistics(name)
        expected = (there[name] - here[name]).T @ here[name] / len(here[name])
        close(found.drift, expected)
        assert (found.residual_drift is not None) == name.endswith(("o_proj.weight", "down_proj.weight"))
    assert file.statistics("lm_head.weight").drift is None


def test_gptq_measures_how_far_the_hidden_states_drifted(untied, quantize, request_, tmp_path):
    """What o_proj's outputs are added to are the block's inputs, for down_proj what the second norm reads."""
    path = tmp_path / "statistics.safetensors"
    quantize(untied, tmp_path / "out", "gptq", levels=4, activations="float", statistics_out=path)
    windows = open_calibration(open_checkpoint(untied), request_).windows
    inputs = hooked_inputs(load_model(tmp_path / "out"), windows)
    here, there = (normalized(load_model(folder), windows) for folder in (tmp_path / "out", untied))
    file = StatisticsFile(path)
    for norm, writer in (("input_layernorm", "self_attn.o_proj"), ("post_attention_layernorm", "mlp.down_proj")):
        for block in range(2):
            at, name = f"model.layers.{block}.{norm}", f"model.layers.{block}.{writer}.weight"
            expected = (there[at] - here[at]).T @ inputs[name] / len(inputs[name])
            close(file.statistics(name).residual_drift, expected)


def normalized(model: torch.nn.Module, windows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """What each norm reads, float64 [tokens, width]."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
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
