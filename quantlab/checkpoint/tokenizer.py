"""Text <-> token ids for a model folder, on the `tokenizers` library.

transformers only converts what has no tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.checkpoint.reader import read_json
from quantlab.checkpoint.source import is_gguf, local_model
from quantlab.errors import InputError

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers


SPACE = "\u2581"  # SentencePiece's sign for it
SENTENCEPIECE_PROBE = " A  b, 12\n\u00e9\u0301\ufb01 \U0001f600 "  # spaces, digits, what normalizing changes, bytes

GPT2_END = "<|endoftext|>"


class Tokenizer:
    """A model's tokenizer. `bos` is the start token's id where the model expects one before every text, else None;
    `eos` holds the ids that end a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos: int | None, eos: frozenset[int]) -> None:
        self.backend, self.bos, self.eos = backend, bos, eos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with `add_special_tokens`, after the start token where the model expects one.

        Raises:
            InputError: the vocabulary has no token for a part of the text, nor one for what is unknown.
        """
        with faults_reported("the model's tokenizer fails on this text"):
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if add_special_tokens and self.bos is not None else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def size(self) -> int:
        """Number of token ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, GGUF file or hub id.

    Raises:
        InputError: the model holds no tokenizer, or a broken one.
    """
    folder = local_model(model)
    if is_gguf(folder):
        from quantlab.checkpoint.gguf_file import GgufFile
        from quantlab.checkpoint.gguf_tokenizer import tokenizer_from_metadata

        return tokenizer_from_metadata(GgufFile(folder).metadata, str(folder))
    return folder_tokenizer(folder)


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
        InputError: the folder holds no tokenizer, or a broken one.
    """
    backend = _folder_backend(folder)
    return Tokenizer(backend, start_token(backend), _end_tokens(folder, backend))


def holds_tokenizer(folder: Path) -> bool:
    """Whether the folder has the files of one."""
    alone = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return alone or all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def _folder_backend(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.is_file():
        return parse_tokenizer(read_text(file), f"{file}: cannot be read")
    with faults_reported(f"{folder}: its tokenizer cannot be converted"):
        if (folder / "tokenizer.model").is_file():
            return _from_sentencepiece(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return _from_merges(folder)
    files = "tokenizer.json, tokenizer.model, or vocab.json and merges.txt"
    way_out = "copy it from the original model" if (folder / "config.json").is_file() else "is this a model folder?"
    raise InputError(f"{folder}: holds no tokenizer ({files}); {way_out}")


def parse_tokenizer(text: str, where: str) -> tokenizers.Tokenizer:
    """The tokenizer that the content of a tokenizer.json describes, tried on a letter.

    Raises:
        InputError: it describes none; the message is `where` and the library's reason.
    """
    import tokenizers

    with faults_reported(where):
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()  # settings of somebody's training, which the file may carry along
        backend.no_padding()
        start_token(backend)
    return backend


def read_text(file: Path) -> str:
    """The content of a text file.

    Raises:
        InputError: it cannot be read, or is no UTF-8 text.
    """
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: cannot be read: no UTF-8 text; download it again") from None


@contextmanager
def faults_reported(where: str) -> Iterator[None]:
    """Turn whatever the content of a file sets off in the libraries into an InputError that begins with `where`."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, no Exception
            raise
        raise InputError(f"{where}: {_one_line(error)}") from None


def _from_sentencepiece(folder: Path) -> tokenizers.Tokenizer:
    """Convert `tokenizer.model`, with the start token unless tokenizer_config.json says otherwise.

    Raises:
        ValueError: another kind of model than Llama's BPE, which the conversion would get wrong.
    """
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    settings = folder / "tokenizer_config.json"
    add_bos = read_json(settings).get("add_bos_token", True) if settings.is_file() else True
    converted = _rebuilt(original, bool(add_bos), str(folder))
    ids = original.encode(SENTENCEPIECE_PROBE)
    if converted.encode(SENTENCEPIECE_PROBE, add_special_tokens=False).ids != ids:
        raise ValueError("tokenizer.model is not of Llama's kind; a tokenizer.json is needed")
    return converted


def _rebuilt(model: sentencepiece.SentencePieceProcessor, add_bos: bool, source: str) -> tokenizers.Tokenizer:
    """By way of what a GGUF file would hold of it."""
    from quantlab.checkpoint.gguf_tokenizer import tokenizer_from_metadata

    pieces = range(model.get_piece_size())
    kinds = ((model.IsUnknown, 2), (model.IsControl, 3), (model.IsUnused, 5), (model.IsByte, 6))  # llama.cpp's numbers
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.IdToPiece(i) for i in pieces],
        "tokenizer.ggml.scores": [model.GetScore(i) for i in pieces],
        "tokenizer.ggml.token_type": [next((kind for test, kind in kinds if test(i)), 1) for i in pieces],
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.ggml.add_space_prefix": model.encode("a", out_type=str)[0].startswith(SPACE),
    }
    for word, number in (("bos", model.bos_id()), ("eos", model.eos_id()), ("unknown", model.unk_id())):
        if number >= 0:
            metadata[f"tokenizer.ggml.{word}_token_id"] = number
    return tokenizer_from_metadata(metadata, source).backend


def convert_sentencepiece(folder: Path, *, add_bos: bool) -> tokenizers.Tokenizer:
    """The `tokenizers` form of a SentencePiece BPE model `folder/tokenizer.model` with Llama's settings.

    SentencePiece puts a space before every text. transformers' conversion leaves it out where the text begins with one,
    which then is lost in decoding; so does its LlamaTokenizer class, whatever tokenizer.json says.
    """
    from tokenizers import normalizers
    from transformers import LlamaTokenizer

    converted = LlamaTokenizer.from_pretrained(str(folder), add_bos_token=add_bos, add_eos_token=False)
    backend: tokenizers.Tokenizer = converted.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.pre_tokenizer = None
    return backend


def _from_merges(folder: Path) -> tokenizers.Tokenizer:
    """Convert GPT-2's `vocab.json` and `merges.txt`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(GPT2_END) is not None:
        backend.add_special_tokens([GPT2_END])
    return backend


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def start_token(backend: tokenizers.Tokenizer) -> int | None:
    """The token that the tokenizer's own post-processor puts before a text."""
    with_special = backend.encode("a").ids
    without = backend.encode("a", add_special_tokens=False).ids
    starts_with_special = len(with_special) > len(without) and with_special[1 : 1 + len(without)] == without
    return with_special[0] if starts_with_special else None


def _end_tokens(folder: Path, backend: tokenizers.Tokenizer) -> frozenset[int]:
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value: Any = read_json(folder / name).get("eos_token_id")  # Any: unchecked JSON
            ids.update(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
    if (folder / "tokenizer_config.json").is_file():
        token: Any = read_json(folder / "tokenizer_config.json").get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and (found := backend.token_to_id(content)) is not None:
            ids.add(found)
    return frozenset(ids)
