"""One tokenizer for the tokens of several: the first one's, and what the others have beside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlab.checkpoint.tokenizer import Tokenizer, parse_tokenizer
from quantlab.errors import InputError
from quantlab.merging.faults import Faults

_WAY_OUT = "take one model's tokens: tokenizer: {source: base}, or the model's name"


@dataclass(frozen=True)
class UnitedTokenizer:
    """Ids by token, and the content of tokenizer.json."""

    ids: Mapping[str, int]
    text: str


def united_tokenizer(
    first: Tokenizer, others: Sequence[Tokenizer], names: tuple[str, ...], faults: Faults
) -> UnitedTokenizer:
    """The first tokenizer's tokens under their ids, then each other's that are new, in the order of their ids there.

    Added tokens stay added ones, special or not. Ordinary tokens of a BPE are made by their own tokenizer's merges,
    which come behind the first one's; how texts are normalized and cut into words is the first one's.

    Args:
        names: of all, for messages.
    """
    text = first.backend.to_str()
    ids = dict(first.backend.get_vocab(with_added_tokens=True))
    union: dict[str, Any] = json.loads(text)
    start = len(ids)
    for other, name in zip(others, names[1:], strict=True):
        content = json.loads(other.backend.to_str())
        theirs = other.backend.get_vocab(with_added_tokens=True)
        new = sorted(theirs.keys() - ids.keys(), key=theirs.__getitem__)
        if not new:
            continue
        if _alphabet(content) != _alphabet(union):
            problem = f"{names[0]} and {name} write tokens differently, so that theirs cannot be told to be the same"
            faults.add(problem, _WAY_OUT)
            continue
        number = max(ids.values(), default=-1) + 1
        ids |= {token: number + i for i, token in enumerate(new)}
        if not _add(union, content, new, ids):
            kind = union["model"]["type"]
            faults.add(
                f"{name} has other ordinary tokens than {names[0]}, and {kind} vocabularies do not unite", _WAY_OUT
            )
    if len(ids) == start:
        return UnitedTokenizer(ids, text)
    return UnitedTokenizer(ids, _checked(union, ids, names, faults))


def _alphabet(content: Mapping[str, Any]) -> tuple[object, ...]:
    """How tokens are spelt: whether as bytes, and what stands for the space or a continued word."""
    decoder, model = json.dumps(content.get("decoder")), content["model"]
    marks = ("ByteLevel" in decoder, "\\u2581" in decoder or "Metaspace" in decoder, model.get("byte_fallback"))
    return (model["type"], *marks, model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))


def _add(union: dict[str, Any], other: Mapping[str, Any], new: Sequence[str], ids: Mapping[str, int]) -> bool:
    """Add tokens of another tokenizer.json; False where its kind of model takes none."""
    added = {entry["content"]: entry for entry in other["added_tokens"]}
    ordinary = [token for token in new if token not in added]
    union["added_tokens"] += [{**added[token], "id": ids[token]} for token in new if token in added]
    model = union["model"]
    if model["type"] not in ("BPE", "WordLevel"):
        return not ordinary
    # The library counts added tokens from the end of the model's vocabulary on, unless the model has them too.
    model["vocab"] |= {entry["content"]: ids[entry["content"]] for entry in union["added_tokens"]}
    model["vocab"] |= {token: ids[token] for token in ordinary}
    if model["type"] == "BPE":
        wanted = set(ordinary)
        model["merges"] += [pair for pair in other["model"]["merges"] if "".join(pair) in wanted]
    return True


def _checked(union: dict[str, Any], ids: Mapping[str, int], names: tuple[str, ...], faults: Faults) -> str:
    text = json.dumps(union, ensure_ascii=False)
    try:
        found = parse_tokenizer(text, "the united tokenizer").get_vocab(with_added_tokens=True)
    except InputError as error:
        faults.add(str(error), _WAY_OUT)
        return text
    if found != ids:
        faults.add(f"the tokens of {' and '.join(names)} do not fit into one tokenizer", _WAY_OUT)
    return text
