"""What a merge does, tensor by tensor, as data: `plan.plan_merge` makes it, `streaming` carries it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.families import Family
from quantlab.merging.references import ModelReference


class OpenedModel(Protocol):
    """What planning asks of an opened model (`sources.MergeSource` is one). Shapes are those of the weights, packed or
    not; names are full Hugging Face names.
    """

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's files, without the adapter."""

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors; a tied head is not among them."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""

    @property
    def family(self) -> Family:
        """The model family's row."""

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The weights' shape: [out, in] for linear weights."""


@dataclass(frozen=True)
class Part:
    """Where one tensor of one model comes from.

    Attributes:
        name: its full name there; a tied model's head has the embedding's.
        rows: for embeddings and heads matched by token: which of its rows each output row is; -1 where the model lacks
            the token (see `TensorPlan`). None: rows as they lie.
        zeros: the model has no such tensor (a bias), and zeros of the planned shape stand for it.
    """

    model: ModelReference
    name: str
    rows: tuple[int, ...] | None = None
    zeros: bool = False


@dataclass(frozen=True)
class RowOverride:
    """A token's row that the config takes from one place (`tokenizer.tokens`).

    Attributes:
        row: of the output.
        source: the tensor that it comes from; its `rows` are None. None: the row is zeros.
        source_row: of that tensor.
        force: whether every model (and the base) takes this row; else only those that lack the token do.
    """

    row: int
    source: Part | None
    source_row: int
    force: bool


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Where parts have `rows`, the rows that a model lacks (-1) are filled before the method runs, the base's too:
    by `overrides` first; else with the base's row, if the base has it; else with the mean of the rows of those parts
    that have it; else, where nobody has it (padding), with zeros. `row_filling.fill_rows` does it.

    Attributes:
        name: in the output.
        shape: of the weights, [out, in] for linear ones.
        dtype: "BF16", "F32", ...: the element type of a float output; that of the input where it is no float.
        method: a key of `methods.table.METHODS`.
        base: the base's tensor, where the method takes one.
        parts: the merged models' tensors, in the config's order.
        parameters: by parameter name as the method's functions spell it in a config ("lambda"); the per-model ones are
            tuples aligned with `parts`.
        overrides: rows from elsewhere, ascending.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: str
    base: Part | None
    parts: tuple[Part, ...]
    parameters: dict[str, Any]
    overrides: tuple[RowOverride, ...] = ()


@dataclass(frozen=True)
class MergedVocabulary:
    """The output's tokens where the models' differ.

    Attributes:
        tokens: by id; None for a number that no token has (padding).
        tokenizer: the whole content of tokenizer.json.
    """

    tokens: tuple[str | None, ...]
    tokenizer: str


@dataclass(frozen=True)
class MergePlan:
    """The whole merge.

    Attributes:
        config: config.json of the output as a float model.
        tensors: in the output's order.
        companions: whose tokenizer, chat template, generation settings and licence go along.
        vocabulary: where tokenizers differ and the config says how to unite them; else None.
        files: what replaces or joins the companions' files, by name; None: the companion's is left out. This holds the
            merged tokenizer.json and the chat template, where the config asks for them.
        notes: what the user should know, a line each.
    """

    config: dict[str, Any]
    tensors: tuple[TensorPlan, ...]
    companions: ModelReference
    vocabulary: MergedVocabulary | None = None
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
