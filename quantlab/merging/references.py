"""What a merge config calls a model: `path_or_repo[@revision][+adapter[@revision]]`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import InputError


@dataclass(frozen=True)
class ModelReference:
    """A model, and the adapter that is added to it.

    Attributes:
        model: folder, GGUF file or hub id, as the user wrote it.
        revision: branch, tag or commit on the hub.
        adapter: folder or hub id of a low-rank adapter.
        adapter_revision: the adapter's branch, tag or commit.
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def __str__(self) -> str:
        text = _joined(self.model, self.revision)
        return text if self.adapter is None else f"{text}+{_joined(self.adapter, self.adapter_revision)}"

    @property
    def without_adapter(self) -> ModelReference:
        """The model alone."""
        return ModelReference(self.model, self.revision)


def parse_reference(text: str) -> ModelReference:
    """Read a reference. A path that exists as it is written wins over a revision or an adapter in its name.

    Raises:
        InputError: a part of it is empty.
    """
    whole = text.strip()
    model, revision, rest = _named(whole, stop="+")
    adapter, adapter_revision, _ = _named(rest[1:], stop="") if rest else (None, None, "")
    if not model or "" in (revision, adapter, adapter_revision):
        raise InputError(f"{whole!r}: is no model; write path_or_repo[@revision][+adapter]")
    return ModelReference(model, revision, adapter, adapter_revision)


def _named(text: str, stop: str) -> tuple[str, str | None, str]:
    """The name that a text begins with, its revision, and the rest from the sign `stop` on, if it has any."""
    ends = [i for i in range(len(text), 0, -1) if i == len(text) or text[i] in f"@{stop}"]
    known = next((end for end in ends if _exists(text[:end])), 0)  # so far it is a path
    cut = text.find(stop, known) if stop else -1
    name, rest = (text, "") if cut < 0 else (text[:cut], text[cut:])
    at = name.rfind("@")
    return (name, None, rest) if at < known else (name[:at], name[at + 1 :], rest)


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (RuntimeError, OSError, ValueError):  # ~name of nobody; a name too long; a zero byte in it
        return False


def _joined(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name}@{revision}"
