"""Files <-> named tensors: reader, writer, tokenizers, model families."""

from quantlab.checkpoint.checkpoint import Checkpoint
from quantlab.checkpoint.reader import open_checkpoint
from quantlab.checkpoint.tensors import TensorEntry
from quantlab.checkpoint.tokenizer import Tokenizer, load_tokenizer
from quantlab.checkpoint.writer import CheckpointWriter, open_writer

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "TensorEntry",
    "Tokenizer",
    "load_tokenizer",
    "open_checkpoint",
    "open_writer",
]
