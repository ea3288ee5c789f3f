"""What a fine-tuning run is told, and the checks that need no file."""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantlab.errors import InputError

METHODS = ("lora", "block-sum", "full")
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
LOGGERS = ("none", "tensorboard", "wandb")
DTYPES = ("float32", "bfloat16")
LEARNING_RATES = {"lora": 2e-4, "block-sum": 2e-4, "full": 2e-5}  # of AdamW, as the field's tools start
MOST_RANK = 1 << 15  # which the kernels can sum
CHECKPOINTING_FROM = 100_000_000  # parameters: smaller models' activations fit as they are


@dataclass(frozen=True)
class FinetuneSettings:
    """One run's settings; defaults are those of the command.

    Attributes:
        method: "lora", "block-sum" (see `adapters.fusing`) or "full", which trains every weight.
        merge_aware: train an ordinary LoRA through the blocks that fusing it will write.
        regrid: with merge_aware: compute scales anew too.
        levels: with merge_aware: the number of codes in use, for stress tests.
        rank, alpha, dropout: of LoRA.
        targets: "attention", "mlp", "all-linear", or ends of module names, parted by commas.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        dora: weight-decomposed LoRA, on float bases.
        packing: fill windows of `context` tokens with whole samples, which do not see each other.
        batch_size: samples (or packed windows) of one forward pass and process.
        accumulation: forward passes of one step.
        epochs: passes over the training samples, unless `max_steps` says otherwise.
        learning_rate: at its highest; None for the method's own.
        warmup: the share of the steps over which the rate grows from 0.
        gradient_checkpointing: keep the inputs of layers only and compute the rest again; None: for models of 100 M
            parameters and more.
        activations: "int8" (packed bases on the CPU: the arithmetic of generation), "float", or "auto", the first where
            it can be.
        dtype: of activations, and of weights that are not packed and not trained.
        eval_every: steps between evaluations and checkpoints; None for ten in a run.
        early_stopping: stop after so many evaluations without a lower loss, and keep the best; None for never.
        logger: where figures go beside training_log.json.
    """

    method: str = "lora"
    merge_aware: bool = False
    regrid: bool = False
    levels: int | None = None
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = "attention"
    rslora: bool = False
    dora: bool = False
    context: int = 512
    packing: bool = False
    batch_size: int = 4
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float | None = None
    scheduler: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    gradient_checkpointing: bool | None = None
    activations: str = "auto"
    dtype: str = "float32"
    eval_every: int | None = None
    early_stopping: int | None = None
    logger: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_words()
        self._check_numbers()
        self._check_combinations()

    @property
    def rate(self) -> float:
        """The learning rate at its highest."""
        return LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate

    @property
    def fuses(self) -> bool:
        """Whether the forward pass computes with fused blocks."""
        return self.merge_aware or self.method == "block-sum"

    @property
    def autocast(self) -> bool:
        """Whether products are computed in bfloat16 while the weights stay fp32: trained in bfloat16 themselves, they
        would lose every update that is smaller than half of their last bit, 1 / 512 of them.
        """
        return self.method == "full" and self.dtype == "bfloat16"

    def _check_words(self) -> None:
        for option, value, words in (
            ("--method", self.method, METHODS),
            ("--scheduler", self.scheduler, SCHEDULERS),
            ("--report-to", self.logger, LOGGERS),
            ("--dtype", self.dtype, DTYPES),
            ("--activations", self.activations, ("auto", "float", "int8")),
        ):
            if value not in words:
                raise InputError(f"{option} {value}: choose one of: {', '.join(words)}")

    def _check_numbers(self) -> None:
        for option, number, least in (
            ("--rank", self.rank, 1),
            ("--context", self.context, 2),
            ("--batch-size", self.batch_size, 1),
            ("--accumulation", self.accumulation, 1),
            ("--max-steps", self.max_steps, 1),
            ("--eval-every", self.eval_every, 1),
            ("--early-stopping", self.early_stopping, 1),
            ("--seed", self.seed, 0),
        ):
            if number is not None and number < least:
                raise InputError(f"{option} {number}: at least {least} is needed")
        if self.rank > MOST_RANK:
            raise InputError(f"--rank {self.rank}: more than {MOST_RANK} is no low rank")
        if self.seed >= 1 << 32:
            raise InputError(f"--seed {self.seed}: at most {(1 << 32) - 1}, which numpy takes")
        for option, value, most in (
            ("--alpha", self.alpha, math.inf),
            ("--epochs", self.epochs, math.inf),
            ("--learning-rate", self.rate, math.inf),
            ("--gradient-clip", self.gradient_clip, math.inf),
        ):
            if not 0 < value < most:
                raise InputError(f"{option} {value}: a positive number is needed")
        for option, share in (
            ("--dropout", self.dropout),
            ("--warmup", self.warmup),
            ("--weight-decay", self.weight_decay),
        ):
            if not 0 <= share < 1:
                raise InputError(f"{option} {share}: a number from 0 to below 1 is needed")

    def _check_combinations(self) -> None:
        if self.merge_aware and self.method != "lora":
            raise InputError(f"--merge-aware is a way to train a LoRA, not --method {self.method}; give one of the two")
        if (self.regrid or self.levels is not None) and not self.merge_aware:
            raise InputError("--regrid and --levels are parts of --merge-aware; add that, or leave them out")
        if self.fuses and self.dropout:
            raise InputError(
                "--dropout: fused weights have none, so that training would see another model; leave it out"
            )
        if self.fuses and self.dora:
            raise InputError("--dora: its update depends on whole rows and cannot be fused into blocks; leave it out")
        if self.method == "full" and (self.dora or self.rslora or self.dropout):
            raise InputError("--dora, --rslora and --dropout belong to a LoRA; --method full has none")
