"""The YAML file of `pretrain`: model, vocabulary, schedule and perhaps quantization, all checked before any work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantlab.checkpoint.families import family_of
from quantlab.errors import InputError
from quantlab.formats import BlockFormat, format_named

SECTIONS = {"model", "vocabulary", "schedule"}
FLOAT = "float"  # in the place of a format: none
POSITIVE_FIELDS = (
    "tokens", "context", "batch_tokens", "micro_batch_tokens", "learning_rate", "evaluate_every", "save_every",
)  # fmt: skip
SEED_LIMIT = 1 << 32  # numpy's and transformers'


@dataclass(frozen=True)
class VocabularySettings:
    """`type` names the trainer; `size` counts pieces, the three special and 256 byte pieces included."""

    size: int
    type: Literal["sentencepiece-bpe"] = "sentencepiece-bpe"


@dataclass(frozen=True)
class Schedule:
    """The optimization schedule; token counts are positions the model is trained on, repeats included.

    The learning rate rises linearly over `warmup_tokens`, stays, and falls linearly to zero over the last `decay` share
    of the tokens. Windows have `short_context` tokens until that last part, then `context`: attention over short
    windows is cheap, and the model learns long range at the end (Hu et al. 2024, MiniCPM, arXiv 2404.06395, for the
    schedule). Until the decay begins, a run does not depend on `tokens`, so a resumed run may change it.

    With two `stages` (`two_stages`) the second half of the tokens has a rate and no weight decay of its own, and the
    long windows; `decay` counts for nothing. 0 stages are two for ternary weights, else one.
    """

    tokens: int
    context: int
    batch_tokens: int
    learning_rate: float
    short_context: int = 0  # 0: `context` throughout
    micro_batch_tokens: int = 8192
    warmup_tokens: int = 0
    decay: float = 0.25
    optimizer: Literal["muon", "adamw"] = "muon"
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    bf16: bool = True
    evaluate_every: int = 100  # steps
    save_every: int = 100  # steps
    seed: int = 0
    stages: int = 0

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / self.batch_tokens))

    @property
    def warmup_steps(self) -> int:
        return min(self.steps, round(self.warmup_tokens / self.batch_tokens))

    @property
    def decay_steps(self) -> int:
        return min(self.steps - self.warmup_steps, round(self.decay * self.steps))

    @property
    def short_steps(self) -> int:
        """Steps at the start that see short windows, if any do."""
        return self.steps // 2 if self.stages == 2 else self.steps - self.decay_steps


@dataclass(frozen=True)
class Quantization:
    """Blocks that forward passes multiply by and the result is written in; the numbers behind them are trained.

    `format` is that of linear layers' weights, `vocabulary` that of embedding and head ("float": fp16 when written);
    `activations` are "int8", as the engine multiplies, "float", or "auto", as `fake_quantize_modules` has it.
    """

    format: str
    vocabulary: str = FLOAT
    activations: Literal["auto", "int8", "float"] = "auto"

    @property
    def linear_format(self) -> BlockFormat:
        """Of linear layers' weights."""
        return format_named(self.format)

    @property
    def vocabulary_format(self) -> BlockFormat | None:
        """Of embedding and head."""
        return None if self.vocabulary == FLOAT else format_named(self.vocabulary)


@dataclass(frozen=True)
class PretrainRecipe:
    """`model` holds the fields of a transformers config, `model_type` among them (its vocabulary size is filled in).
    Without `quantization` a float model is trained.
    """

    model: dict[str, Any]
    vocabulary: VocabularySettings
    schedule: Schedule
    quantization: Quantization | None = None

    def with_format(self, name: str | None) -> PretrainRecipe:
        """The recipe with linear layers in that format, "float" for none and None for the recipe's own, and with the
        stages that suit it where the schedule does not say.

        Raises:
            InputError: there is no such format.
        """
        chosen = self.quantization
        if name is not None and name.lower() == FLOAT:
            chosen = None
        elif name is not None:
            chosen = dataclasses.replace(chosen or Quantization(name), format=name)
        if chosen is not None:
            chosen = dataclasses.replace(chosen, format=chosen.linear_format.name)  # aliases are one run's
        is_ternary = chosen is not None and chosen.linear_format.scale_of == "tensor"
        stages = self.schedule.stages or (2 if is_ternary else 1)
        schedule = dataclasses.replace(self.schedule, stages=stages)
        return dataclasses.replace(self, schedule=schedule, quantization=chosen)

    def with_schedule(self, **changes: Any) -> PretrainRecipe:  # Any: numbers for fields
        """The recipe with some of the schedule's fields replaced.

        Raises:
            InputError: a value is not above zero, or the seed none that torch and numpy take.
        """
        for name, value in changes.items():
            if name == "seed" and not 0 <= value < SEED_LIMIT:
                raise InputError(f"seed {value}: must be at least 0 and below 2^32")
            if name != "seed" and value < 1:
                raise InputError(f"{name} {value}: must be greater than zero")
        return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule, **changes))


def read_pretrain_recipe(path: Path) -> PretrainRecipe:
    """Read and check a pretraining recipe.

    Raises:
        InputError: the file is missing or not YAML, or a section or field is missing, unknown or of a wrong type.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or set(data) - {"quantization"} != SECTIONS:
        raise InputError(f"{path}: needs the sections model, vocabulary and schedule, and may have quantization")
    if not isinstance(data["model"], dict) or not isinstance(data["model"].get("model_type"), str):
        raise InputError(f"{path}: model.model_type is missing (for example: llama)")
    family_of(data["model"], f"{path}: model")  # one that the folder can be written for
    vocabulary = _section(VocabularySettings, data["vocabulary"], f"{path}: vocabulary")
    schedule = _section(Schedule, data["schedule"], f"{path}: schedule")
    if vocabulary.type != "sentencepiece-bpe":
        raise InputError(f"{path}: vocabulary.type must be sentencepiece-bpe, not {vocabulary.type!r}")
    _check_schedule(schedule, path)
    quantization = None
    if "quantization" in data:
        quantization = _section(Quantization, data["quantization"], f"{path}: quantization")
        _check_quantization(quantization, path)
    return PretrainRecipe(data["model"], vocabulary, schedule, quantization)


def _section(kind: type, data: object, where: str) -> Any:  # Any: an instance of `kind`
    if not isinstance(data, dict):
        raise InputError(f"{where}: must be a mapping")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(map(str, data)) - set(fields)):
        raise InputError(f"{where}: unknown fields {', '.join(unknown)}; known: {', '.join(fields)}")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in data]
    if missing:
        raise InputError(f"{where}: missing fields {', '.join(missing)}")
    return kind(**{name: _number(value, str(fields[name].type), f"{where}.{name}") for name, value in data.items()})


def _number(value: object, kind: str, where: str) -> object:
    """YAML reads 1e-3 as text and 3 as an int: accept any spelling of the number that the field asks for."""
    if kind == "bool" and not isinstance(value, bool):
        raise InputError(f"{where}: must be true or false, not {value!r}")
    if kind not in ("int", "float"):
        return value
    try:
        number = float(str(value))
    except ValueError:
        raise InputError(f"{where}: must be a number, not {value!r}") from None
    if not 0 <= number < float("inf") or (kind == "int" and number != int(number)):
        raise InputError(f"{where}: must be a non-negative {'whole ' * (kind == 'int')}number, not {value!r}")
    return int(number) if kind == "int" else number


def _check_quantization(quantization: Quantization, path: Path) -> None:
    for name in ("format", "vocabulary", "activations"):
        value = getattr(quantization, name)
        if not isinstance(value, str):
            raise InputError(f"{path}: quantization.{name}: must be a name, not {value!r}")
        words = ("auto", "int8", "float")
        if name == "activations" and value not in words:
            raise InputError(f"{path}: quantization.activations must be auto, int8 or float, not {value!r}")
    try:
        _ = quantization.linear_format, quantization.vocabulary_format
    except InputError as error:
        raise InputError(f"{path}: quantization: {error}") from None


def _check_schedule(schedule: Schedule, path: Path) -> None:
    for name in POSITIVE_FIELDS:
        if not getattr(schedule, name) > 0:
            raise InputError(f"{path}: schedule.{name} must be greater than zero")
    if schedule.optimizer not in ("muon", "adamw"):
        raise InputError(f"{path}: schedule.optimizer must be muon or adamw, not {schedule.optimizer!r}")
    if schedule.stages not in (0, 1, 2):
        raise InputError(f"{path}: schedule.stages must be 1 or 2, or 0 for what suits the weights")
    if schedule.decay > 1:
        raise InputError(f"{path}: schedule.decay is a share of the steps, at most 1")
    if schedule.seed >= SEED_LIMIT:
        raise InputError(f"{path}: schedule.seed must be below 2^32")
    if schedule.warmup_tokens > schedule.tokens:
        raise InputError(f"{path}: schedule.warmup_tokens exceeds schedule.tokens")
    for name in ("short_context", "context"):
        context = getattr(schedule, name)
        if context == 1:
            raise InputError(f"{path}: schedule.{name} must be at least 2: a start token and one to predict")
        if context and schedule.micro_batch_tokens % context:
            raise InputError(f"{path}: schedule.micro_batch_tokens must be a multiple of schedule.{name} ({context})")
    if schedule.batch_tokens % schedule.micro_batch_tokens:
        raise InputError(f"{path}: schedule.batch_tokens must be a multiple of schedule.micro_batch_tokens")
