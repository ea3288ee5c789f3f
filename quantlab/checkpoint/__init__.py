"""Files <-> named tensors: reader, writer, tokenizers, model families."""

from quantlab.checkpoint.reader import Checkpoint, open_checkpoint
from quantlab.checkpoint.tensors import TensorEntry
from quantlab.checkpoint.tokenizer import Tokenizer, load_tokenizer
from quantlab.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "TensorEntry", "Tokenizer", "load_tokenizer", "open_checkpoint"]
