"""Load models for torch: a folder, GGUF file or hub id, packed or float, as a transformers model in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantlab.checkpoint import Checkpoint, open_checkpoint
from quantlab.checkpoint.export import packed_config
from quantlab.checkpoint.gguf_checkpoint import GgufCheckpoint
from quantlab.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    activations: str = "float",
) -> PreTrainedModel:
    """Load a causal language model; packed weights stay packed and compute in float activations unless told otherwise.

    Args:
        model: folder, GGUF file or hub id.
        dtype: of activations and unpacked weights; fp32 by default.
        device: where to put it; torch's default device if not given.
        activations: of packed linear layers: "float", of `dtype`, or "int8", rounded in runs of 32 and multiplied
            straight from the blocks, as the native engine does it; faster, less exact, on CPU alone (`QuantLinear`).

    Raises:
        InputError: the files are missing, damaged, of an unsupported family, or disagree with config.json;
            `activations` is neither of the two, or is "int8" for another device or for a model without packed layers.
    """
    checkpoint = open_checkpoint(model)  # its checks and one-line errors come first
    _check_activations(activations, checkpoint, device)
    _check_tensors(checkpoint)

    import torch

    import quantlab.hf  # noqa: F401 registers the quantizer
    from quantlab.nn import set_activations

    chosen = dtype or torch.float32
    try:
        with _quietly():
            if isinstance(checkpoint, GgufCheckpoint):
                loaded = _load_gguf(checkpoint, chosen)
            else:
                loaded = _load_folder(checkpoint.path, chosen)
    except InputError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{checkpoint.path}: transformers cannot load it: {reason[:400]}") from None
    if device is not None:
        loaded.to(device)
    set_activations(loaded, activations)
    return loaded.eval()


def _check_activations(activations: str, checkpoint: Checkpoint, device: str | torch.device | None) -> None:
    import torch

    from quantlab.nn.linear import checked_activations

    if checked_activations(activations) != "int8":
        return
    chosen = torch.get_default_device() if device is None else torch.device(device)
    if chosen.type != "cpu":
        raise InputError(f"activations 'int8' are computed on the CPU only, not on {chosen}; choose device='cpu'")
    if not _has_packed_layers(checkpoint):
        raise InputError(f"{checkpoint.path}: int8 activations need packed linear layers; quantize the model first")


def _has_packed_layers(checkpoint: Checkpoint) -> bool:
    """Whether a linear layer is packed: a tied head makes the embedding one."""
    packed = {name for name in checkpoint.names if checkpoint.format(name) is not None}
    return bool(packed if checkpoint.tied else packed - {checkpoint.family.embedding})


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars: a library does not print."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _load_folder(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=False, weights_only=True)


def _load_gguf(checkpoint: GgufCheckpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Hand transformers the weights, for it reads few of the files that we read."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _transformers_config(checkpoint)
    state = {name: _state(checkpoint, name, dtype) for name in checkpoint.names}
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def _state(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as the modules hold it."""
    if checkpoint.format(name) is not None:
        return checkpoint.read_packed(name).blocks
    weight = checkpoint.read(name, dtype)
    return weight.T.contiguous() if checkpoint.family.is_transposed(name) else weight


def _transformers_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """transformers' form of the model's configuration.

    Raises:
        InputError: whatever a value of it sets off.
    """
    from transformers import AutoConfig

    _check_depth(checkpoint)
    try:
        if not isinstance(checkpoint, GgufCheckpoint):
            return AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=False)
        fields = packed_config(checkpoint)
        return AutoConfig.for_model(**fields)
    except Exception as error:
        raise _no_model(checkpoint, error) from None


def _check_depth(checkpoint: Checkpoint) -> None:
    """Layers are made one by one, even without weights: of a billion that a damaged file claims none should be."""
    for key in ("num_hidden_layers", "n_layer"):
        layers = checkpoint.config.get(key)
        if isinstance(layers, int) and layers > len(checkpoint.names):
            problem = f"{key} is {layers}, and the files hold {len(checkpoint.names)} tensors in all"
            raise InputError(f"{_config_place(checkpoint)}: {problem}")


def _no_model(checkpoint: Checkpoint, error: Exception) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return InputError(f"{_config_place(checkpoint)}: describes no model: {reason[:400]}")


def _config_place(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if isinstance(checkpoint, GgufCheckpoint) else checkpoint.path / "config.json"


def tensor_faults(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Where the files' headers differ from the model that the configuration describes: (tensor, problem).

    Raises:
        InputError: the configuration describes no model.
    """
    faults = []
    for name, shape in _model_shapes(checkpoint).items():
        if name not in checkpoint.names:
            faults.append((name, "is missing"))
        elif checkpoint.shape(name) != shape:
            faults.append((name, f"is {list(checkpoint.shape(name))} instead of {list(shape)}"))
        elif checkpoint.recipe is not None and checkpoint.recipe.format_for(name, shape) != checkpoint.format(name):
            faults.append((name, "is not packed as the rules say"))
    return faults


def _check_tensors(checkpoint: Checkpoint) -> None:
    """All of that at once, before weights load."""
    faults = tensor_faults(checkpoint)
    if faults:
        (name, problem), more = faults[0], f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        where = f"{checkpoint.path}: the files are not those of its config.json"
        raise InputError(f"{where}: {name} {problem}{more}")


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model that the configuration describes, on the meta device: modules without weights.

    Raises:
        InputError: the configuration describes no model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _transformers_config(checkpoint)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a value of config.json sets off
        raise _no_model(checkpoint, error) from None


def _model_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the model needs; [out, in] for linear weights."""
    model = empty_model(checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if checkpoint.tied:
        shapes.pop(checkpoint.family.head, None)
    return {name: shape[::-1] if checkpoint.family.is_transposed(name) else shape for name, shape in shapes.items()}
