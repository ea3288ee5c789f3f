"""quantlab: compress, adapt, merge and run GPT-style language models on the machine you have.

Names load on first use (PEP 562): importing quantlab imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantlab.adapters.extract import extract_adapter
    from quantlab.adapters.reading import read_adapter
    from quantlab.calibration.calibrated import CalibrationOptions
    from quantlab.calibration.fuse import fuse_adapter
    from quantlab.calibration.learned import LearnSettings
    from quantlab.calibration.quantize import quantize_checkpoint
    from quantlab.calibration.samples import CalibrationRequest
    from quantlab.checkpoint import load_tokenizer, open_checkpoint
    from quantlab.errors import InputError
    from quantlab.evaluation.compare import compare
    from quantlab.evaluation.perplexity import perplexity
    from quantlab.formats import FORMATS, Recipe
    from quantlab.generation.engines import load_engine
    from quantlab.generation.generate import generate
    from quantlab.generation.sampling import SamplingParams
    from quantlab.loading import load_model
    from quantlab.merging.merge import merge_checkpoints
    from quantlab.retrieval.index import open_index
    from quantlab.retrieval.indexing import index_documents
    from quantlab.search.evolve import evolve
    from quantlab.training.finetune import finetune
    from quantlab.training.finetune_settings import FinetuneSettings
    from quantlab.training.pretrain import pretrain
    from quantlab.training.qat import qat
    from quantlab.training.qat_settings import QatSettings

_HOMES = {
    "CalibrationOptions": "quantlab.calibration.calibrated",
    "CalibrationRequest": "quantlab.calibration.samples",
    "FORMATS": "quantlab.formats",
    "FinetuneSettings": "quantlab.training.finetune_settings",
    "InputError": "quantlab.errors",
    "LearnSettings": "quantlab.calibration.learned",
    "QatSettings": "quantlab.training.qat_settings",
    "Recipe": "quantlab.formats",
    "SamplingParams": "quantlab.generation.sampling",
    "compare": "quantlab.evaluation.compare",
    "evolve": "quantlab.search.evolve",
    "extract_adapter": "quantlab.adapters.extract",
    "finetune": "quantlab.training.finetune",
    "fuse_adapter": "quantlab.calibration.fuse",
    "generate": "quantlab.generation.generate",
    "index_documents": "quantlab.retrieval.indexing",
    "load_engine": "quantlab.generation.engines",
    "load_model": "quantlab.loading",
    "load_tokenizer": "quantlab.checkpoint",
    "merge_checkpoints": "quantlab.merging.merge",
    "open_checkpoint": "quantlab.checkpoint",
    "open_index": "quantlab.retrieval.index",
    "perplexity": "quantlab.evaluation.perplexity",
    "pretrain": "quantlab.training.pretrain",
    "qat": "quantlab.training.qat",
    "quantize_checkpoint": "quantlab.calibration.quantize",
    "read_adapter": "quantlab.adapters.reading",
}

__all__ = [
    "FORMATS",
    "CalibrationOptions",
    "CalibrationRequest",
    "FinetuneSettings",
    "InputError",
    "LearnSettings",
    "QatSettings",
    "Recipe",
    "SamplingParams",
    "compare",
    "evolve",
    "extract_adapter",
    "finetune",
    "fuse_adapter",
    "generate",
    "index_documents",
    "load_engine",
    "load_model",
    "load_tokenizer",
    "merge_checkpoints",
    "open_checkpoint",
    "open_index",
    "perplexity",
    "pretrain",
    "qat",
    "quantize_checkpoint",
    "read_adapter",
]


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for
    if name == "__version__":
        from importlib.metadata import version

        return version("quantlab")
    if name not in _HOMES:
        raise AttributeError(f"module 'quantlab' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
