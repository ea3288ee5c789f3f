"""An adapter as data: pairs of low-rank factors by tensor name. numpy only, so that generation needs no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.errors import InputError

METHODS = ("lora", "block-sum", "merge-aware")


@dataclass(frozen=True)
class LowRankPair:
    """What is added to one weight [out, in]: `scale * b @ a` (LoRA, Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        a: float32 [rank, in].
        b: float32 [out, rank].
        scale: alpha / rank, or alpha / sqrt(rank) (rank-stabilized LoRA, arXiv 2312.03732).
        magnitude: float32 [out] of DoRA (arXiv 2402.09353), which rescales the rows of the sum to these norms; else
            None.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Rows of `a`."""
        return len(self.a)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: (out, in)."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Training:
    """How an adapter came to be, as far as fusing it depends on that.

    Attributes:
        base: `model_digest` of the base; empty where nobody recorded it.
        regrid: merge-aware: whether scales were computed anew in training, too.
        levels: merge-aware: the number of codes in use where it was not the format's own.
        device: of the training: only a "cpu"'s arithmetic can be repeated bit by bit.
        vocabulary: tokens that the base has ids for; 0 where nobody recorded it.
    """

    base: str = ""
    regrid: bool = False
    levels: int | None = None
    device: str = ""
    vocabulary: int = 0


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates by full Hugging Face weight name, each [out, in], GPT-2's Conv1D weights too.

    Attributes:
        path: where it was read, for messages.
        method: "lora"; "block-sum", whose `a` is constant along each run of 32 columns; or "merge-aware", trained
            through the quantizer of its base.
        pairs: by weight name.
        training: what fusing has to know.
    """

    path: Path
    method: str
    pairs: Mapping[str, LowRankPair]
    training: Training = field(default_factory=Training)

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA: then its update depends on the base's weights."""
        return any(pair.magnitude is not None for pair in self.pairs.values())

    @property
    def parameters(self) -> int:
        """Numbers in its tensors, as they lie in the files."""
        parts = (part for pair in self.pairs.values() for part in (pair.a, pair.b, pair.magnitude))
        return sum(part.size for part in parts if part is not None)

    def fingerprint(self) -> str:
        """A hash of what it does: names, factors and scales, and how blocks take them up."""
        hasher = hashlib.sha256(f"{self.method} {self.training.regrid} {self.training.levels}\n".encode())
        for name, pair in sorted(self.pairs.items()):
            hasher.update(f"{name} {pair.a.shape} {pair.b.shape} {pair.scale!r}\n".encode())
            for part in (pair.a, pair.b, pair.magnitude):
                if part is not None:
                    hasher.update(np.ascontiguousarray(part).data)
        return hasher.hexdigest()


def check_fits(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Refuse an adapter that was made for another model.

    Raises:
        InputError: tensors that the checkpoint lacks, or has in another shape; the message lists them. Or its
            vocabulary is another.
    """
    faults = []
    trained, size = adapter.training.vocabulary, checkpoint.config.get("vocab_size")
    if trained and isinstance(size, int) and size != trained:
        faults.append(f"{size} tokens are in its vocabulary, the adapter's base has {trained}")
    names = set(checkpoint.names)
    for name, pair in adapter.pairs.items():
        if name not in names:
            faults.append(f"{name} is not in the model")
        elif tuple(checkpoint.shape(name)) != pair.shape:
            faults.append(f"{name} is {list(checkpoint.shape(name))} in the model, the adapter's {list(pair.shape)}")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise InputError(
            f"{adapter.path}: does not fit {checkpoint.path}: {'; '.join(faults[:3])}{more}; "
            "give the model that it was trained on"
        )


def is_block_constant(a: np.ndarray, block: int) -> bool:
    """Whether the rows of `a` [rank, columns] repeat one value along each run of `block` columns."""
    if a.shape[1] % block:
        return False
    runs = a.reshape(len(a), -1, block)
    return bool((runs == runs[:, :, :1]).all())
