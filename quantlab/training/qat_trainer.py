"""The fine-tuning trainer as quantization-aware training uses it: checkpoints of what is trained, rounding switched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from quantlab.errors import InputError
from quantlab.nn.fake_quant import enable_fake_quant, fake_quant_layers
from quantlab.training.failures import TrainingFailedError
from quantlab.training.trainer import NextTokenTrainer

TRAINED = "trained.safetensors"


class QatTrainer(NextTokenTrainer):
    """Saves the trained parameters alone, for the rest is in the model's files; evaluates what would be written, also
    while the quantizers are off.
    """

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().compute_loss(*args, **kwargs)
        except InputError as error:  # a quantizer's, of weights that were fine when training began
            step = self.state.global_step + 1
            raise TrainingFailedError(f"in step {step} weights cannot be packed any more: {error}") from None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        was = [(layer, layer.enabled) for _, layer in fake_quant_layers(self.model)]
        enable_fake_quant(self.model, True)
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            for layer, enabled in was:
                layer.enabled = enabled

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in self._trained().items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load(Path(self.state.best_model_checkpoint))

    @torch.no_grad()
    def _load(self, folder: Path) -> None:
        saved = load_file(folder / TRAINED)
        for name, parameter in self._trained().items():
            parameter.copy_(saved[name])

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


class FloatWarmup(TrainerCallback):
    """Leaves the quantizers of `model` off for the first `steps` steps."""

    def __init__(self, model: torch.nn.Module, steps: int) -> None:
        self._model, self._steps = model, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        enable_fake_quant(self._model, state.global_step >= self._steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        enable_fake_quant(self._model, True)
