"""What a run of quantization-aware training is told, beside what every fine-tuning is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from quantlab.errors import InputError
from quantlab.formats import format_named
from quantlab.training.finetune_settings import FinetuneSettings

TRAINED = ("full", "scales", "minimums", "lora")
OF_SCALES = ("scales", "minimums")
# Of AdamW: of full training as the field's QAT recipes have it; of scales in shares of a block's d.
LEARNING_RATES = {"full": 1e-5, "lora": 2e-4, "scales": 5e-3, "minimums": 5e-3}
TERNARY_RATE = 1e-4  # of full training: ternary weights are learnt anew rather than adjusted (ParetoQ)
FORMAT = "q4_1"


@dataclass(frozen=True)
class QatSettings:
    """How a model is trained for its format; defaults are those of the command.

    Attributes:
        format: of linear weights; q4_1 if not given, and that of the model where it is quantized already.
        uniform: embedding and head take `format` too, instead of Q8_0.
        recipe: a preset or YAML file that replaces `format` and `uniform`.
        levels: the number of codes that blocks' linear weights may use, for stress tests.
        train: "full", every weight through the quantizer; "lora", a low-rank update of frozen float weights through the
            quantizer; "scales", d and m of frozen codes; "minimums", m alone.
        method: of the first codes of "scales" and "minimums", as `quantize_checkpoint` has them; training rows
            calibrate.
        temperature: of the divergence from a teacher.
        float_steps: steps at the start without rounding.
    """

    format: str | None = None
    uniform: bool = False
    recipe: str | None = None
    levels: int | None = None
    train: str = "full"
    method: str = "rtn"
    temperature: float = 1.0
    float_steps: int = 0

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise InputError(f"--train {self.train}: choose one of: {', '.join(TRAINED)}")
        if self.format is not None:
            format_named(self.format)
        if not 0 < self.temperature < math.inf:
            raise InputError(f"--temperature {self.temperature}: a positive number is needed")
        if self.float_steps < 0:
            raise InputError(f"--float-steps {self.float_steps}: at least 0 is needed")
        if self.train in OF_SCALES and self.float_steps:
            raise InputError(f"--float-steps: with --train {self.train} codes are fixed from the start; leave it out")
        if self.train not in OF_SCALES and self.method != "rtn":
            raise InputError(
                f"--method {self.method}: --train {self.train} rounds to nearest at every step; "
                "leave it out, or use --train scales"
            )

    @property
    def trains_scales(self) -> bool:
        """Whether codes are frozen."""
        return self.train in OF_SCALES

    @property
    def _learning_rate(self) -> float:
        is_ternary = self.format is not None and format_named(self.format).scale_of == "tensor"
        return TERNARY_RATE if is_ternary and self.train == "full" else LEARNING_RATES[self.train]

    def training(self, given: FinetuneSettings) -> FinetuneSettings:
        """The settings that the trainer takes: `given` with this kind of training's learning rate, unless it has one.

        Raises:
            InputError: they ask for what packed weights cannot have.
        """
        if given.fuses or given.dora or given.dropout:
            raise InputError(
                "--train lora fuses its update as it is: no block-sum, merge-aware, DoRA or dropout with it"
            )
        if self.trains_scales and given.activations == "int8":
            raise InputError(f"--activations int8: --train {self.train} computes in float activations; leave it out")
        rate = self._learning_rate if given.learning_rate is None else given.learning_rate
        return replace(given, method="lora" if self.train == "lora" else "full", learning_rate=rate)
