"""What a training needs around it: installed packages, a device, and its place among several processes."""

from __future__ import annotations

import atexit
import gc
import os
from importlib.util import find_spec

from quantlab.errors import InputError, missing_extra
from quantlab.training.finetune_settings import FinetuneSettings


def check_packages(settings: FinetuneSettings) -> None:
    """Refuse at once what would fail after the model was loaded.

    Raises:
        InputError: a package that these settings need is not installed.
    """
    if find_spec("accelerate") is None:
        raise missing_extra("accelerate", "train")
    if settings.packing and find_spec("trl") is None:
        raise missing_extra("trl", "train")
    usable = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}.get(settings.logger)
    if usable is not None and all(find_spec(name) is None for name in usable):
        raise InputError(
            f"--report-to {settings.logger}: {settings.logger} is not installed; install it with: "
            f"pip install {settings.logger}"
        )


def chosen_device(device: str) -> str:
    """The kind of device that `--device` means, in torch's word for it.

    Raises:
        InputError: there is none of that kind here.
    """
    import torch

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if accelerator is None else accelerator.type
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"--device {device}: choose auto, cpu, or an accelerator such as cuda") from None
    if kind != "cpu" and not torch.accelerator.is_available():
        raise InputError(f"--device {device}: torch finds no accelerator here; choose cpu")
    return kind


def refuse_sharding_on_cpu(device: str) -> None:
    """accelerate would leave it out without a word.

    Raises:
        InputError: accelerate was told to shard.
    """
    if device == "cpu" and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes"):
        raise InputError("FSDP shards a model over accelerators only; on CPUs several processes share the data instead")


def is_first_process() -> bool:
    """Whether this is the only process, or the first of them, the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def leave_group_at_exit() -> None:
    """After a training that ended well, have this process leave its process group before Python is torn down.

    Gloo's threads may still hold a tensor that a Python object belongs to. One that gives it up while the interpreter
    is finalized aborts the process ("terminate called without an active exception", pytorch/pytorch#179291), and the
    launcher ends the others with it. They are joined once nothing refers to the group. After a failure they may wait
    for the other processes, and the launcher would never hear of it.
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # a trainer and what DDP wraps refer to each other, and to the group
        torch.distributed.destroy_process_group()
