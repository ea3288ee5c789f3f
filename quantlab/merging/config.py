"""A merge config: mergekit's YAML words (https://github.com/arcee-ai/mergekit documents them) as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantlab.errors import InputError
from quantlab.merging.references import ModelReference
from quantlab.merging.values import Setting

MOST_BYTES = 10_000_000  # of a config file

Parameters = Mapping[str, Setting]


@dataclass(frozen=True)
class MergedModel:
    """One model of a merge, or of a slice of it.

    Attributes:
        layers: the layers of a slice's source, from the first up to but without the last; None: all.
        parameters: that the config gives for this model alone.
    """

    reference: ModelReference
    parameters: Parameters = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """Layers of the output that are merged of equally many layers of each source."""

    sources: tuple[MergedModel, ...]
    parameters: Parameters = field(default_factory=dict)
    base: ModelReference | None = None


@dataclass(frozen=True)
class TokenSource:
    """Where a token's row of embedding and head comes from.

    Attributes:
        model: None: the row is zeros.
        token: another token's text or id there; None: the token itself.
        force: for models that have the token, too.
    """

    model: ModelReference | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """How vocabularies are united: `source` says whose tokens the output has."""

    source: Literal["union", "base"] | ModelReference
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    multiple: int = 1  # of which the rows of the embedding are


@dataclass(frozen=True)
class MergeConfig:
    """A whole config; either `models` or `slices` is not empty.

    Attributes:
        method: a key of `methods.table.METHODS`.
        base: the model that deltas are taken from.
        parameters: for all tensors and models, unless a slice or a model says otherwise.
        dtype: of a float output, as safetensors spells it; None: as the inputs'.
        tokenizer: None: all models must have the same tokens.
        chat_template: "auto", a name that `chat_template.TEMPLATES` has, or a template; None: the companion's.
        zero_biases: whether a bias that some models lack counts as zeros there.
        text: the config as the user wrote it.
        notes: on what the config says without effect.
        source: the file, for messages.
    """

    method: str
    models: tuple[MergedModel, ...] = ()
    slices: tuple[Slice, ...] = ()
    base: ModelReference | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    zero_biases: bool = False
    text: str = ""
    notes: tuple[str, ...] = ()
    source: str = "the merge config"

    @property
    def references(self) -> tuple[ModelReference, ...]:
        """Every model that it names, the base first if there is one, each once."""
        named = [self.base, *(model.reference for model in self.models)]
        for piece in self.slices:
            named += [piece.base, *(model.reference for model in piece.sources)]
        if self.tokenizer is not None:
            source = self.tokenizer.source
            named.append(source if isinstance(source, ModelReference) else None)
            named += [token.model for token in self.tokenizer.tokens.values()]
        return tuple(dict.fromkeys(reference for reference in named if reference is not None))


def read_config(source: str | Path) -> MergeConfig:
    """Read and check a config, in itself; whether its models go together is for `plan.plan_merge` to find out.

    Args:
        source: a file, or the YAML text itself: a `str` of more than one line, or one in braces.

    Raises:
        InputError: no YAML, or `MergeError` with all that is wrong in it, by line and key.
    """
    from quantlab.merging.config_reader import ConfigReader

    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return ConfigReader(source, "the merge config").config()
    path = Path(source)
    return ConfigReader(_text(path), str(path)).config()


def _text(path: Path) -> str:
    from quantlab.checkpoint.positioned import read_whole

    try:
        return read_whole(path, MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give the YAML file of a merge") from None
