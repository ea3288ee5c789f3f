"""The sides of adapter_speed.py: each trains in a process of its own and says how fast, and at what peak of memory."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlab.training.prepared import DataSettings

SIDES = ("peft-bf16", "peft-fp32", "bnb-nf4", "quantlab-int8", "quantlab-float", "quantlab-int8-bf16",
         "quantlab-float-bf16")  # fmt: skip
WARM = 1  # steps
ALPHA_TIMES_RANK = 2.0
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class Job:
    """What all sides do; `work` holds models and rows."""

    work: Path
    steps: int
    context: int
    rank: int

    @property
    def all_steps(self) -> int:
        """Warming up included; as many rows are there."""
        return self.steps + WARM

    @property
    def float_model(self) -> Path:
        """In bf16."""
        return self.work / "bf16"

    @property
    def packed_model(self) -> Path:
        """In Q4_1, embedding and head in Q8_0."""
        return self.work / "q4_1"

    @property
    def rows(self) -> Path:
        """As `finetune` takes them."""
        return self.work / "rows.jsonl"

    @property
    def ids(self) -> Path:
        """The same as token ids, int64 [rows, context]."""
        return self.work / "ids.npy"

    @property
    def data_settings(self) -> DataSettings:
        """All rows to train on, each cut to the context."""
        from quantlab.training.prepared import DataSettings

        return DataSettings(self.context, held_out=0, completion_only=False, too_long="cut")


def measure(side: str, job: Job) -> dict[str, float]:
    """Train, and say what it took."""
    times = ours(side, job) if side.startswith("quantlab") else theirs(side, job)
    seconds = times[-1] - times[WARM - 1]
    return {"tokens_per_second": job.steps * job.context / seconds, "peak_bytes": peak_bytes()}


def ours(side: str, job: Job) -> list[float]:
    """`quantlab finetune`; when each step ended."""
    from quantlab.training.finetune import finetune
    from quantlab.training.finetune_settings import FinetuneSettings

    times: list[float] = []
    settings = FinetuneSettings(
        rank=job.rank, alpha=ALPHA_TIMES_RANK * job.rank, context=job.context, batch_size=1, max_steps=job.all_steps,
        learning_rate=LEARNING_RATE, gradient_checkpointing=True, eval_every=job.all_steps,
        activations="int8" if "int8" in side else "float", dtype="bfloat16" if side.endswith("bf16") else "float32",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=job.work) as folder:
        finetune(
            job.packed_model, job.rows, Path(folder) / "adapter", settings=settings, data_settings=job.data_settings,
            device="cpu", progress=lambda *_: times.append(time.perf_counter()),
        )  # fmt: skip
    return times


def theirs(side: str, job: Job) -> list[float]:
    """peft on transformers' Trainer as people write it; when each step ended."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    times: list[float] = []
    model = their_model(side, job)
    model.config.use_cache = False
    lora = LoraConfig(
        r=job.rank, lora_alpha=ALPHA_TIMES_RANK * job.rank, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.from_numpy(np.load(job.ids))]
    with tempfile.TemporaryDirectory(dir=job.work) as folder:
        training = TrainingArguments(
            output_dir=folder, max_steps=job.all_steps, per_device_train_batch_size=1, learning_rate=LEARNING_RATE,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=side != "peft-fp32", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(get_peft_model(model, lora), training, train_dataset=rows, callbacks=[Clock()])
        trainer.train()
    return times


def their_model(side: str, job: Job) -> Any:
    """transformers' model, quantized while it loads if the side says so."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if side != "bnb-nf4":
        dtype = torch.float32 if side == "peft-fp32" else torch.bfloat16
        return AutoModelForCausalLM.from_pretrained(job.float_model, dtype=dtype)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        job.float_model, dtype=torch.bfloat16, quantization_config=nf4, device_map="cpu"
    )  # fmt: skip


def peak_bytes() -> int:
    """The process's largest resident memory so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
