"""What hostile files have in them, and what may come of it: a file that opens, or one line."""

from __future__ import annotations

import contextlib
import copy
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.gguf_file import GgufFile
from quantlab.checkpoint.safetensors_file import SafetensorsFile
from quantlab.errors import InputError

# The same cases in every run: what fails once fails again.
CASES = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# The most that a header takes in memory for each of its bytes: a `{},` of JSON becomes a dictionary of 64 bytes, a text
# of two characters an object of 51. And what Python needs whatever the file is.
BYTES_PER_BYTE, BYTES_AT_LEAST = 32, 100_000

SMALL = [0, 1, 2, 3, 4, 5, 8, 31, 32, 33, 64, 255, 1 << 16]
EDGES = [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
NUMBERS = st.sampled_from([*SMALL, 1 << 40, 1 << 61, (1 << 62) + 1, *EDGES]) | st.integers(0, (1 << 64) - 1)
BYTES = st.tuples(st.sampled_from(["put", "insert", "delete", "cut"]), st.integers(0, 1 << 30), st.binary(max_size=9))
TEXTS = [
    "",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "\x1b[31m\x07",
    "\u202ea",
    "\ud800",
    "x" * 5000,
    "NaN",
    "1e999",
    "[/x]",
]
EVIL_TEXTS = st.sampled_from(TEXTS)
STRANGE = [-1.5, 1e308, float("nan"), float("inf"), 10**400, [], {}, [[]], {"a": {}}, [[[[[[[[1]]]]]]]], ["", 1]]
EVIL_VALUES = st.none() | st.booleans() | EVIL_TEXTS | st.integers(-5, 5) | NUMBERS | st.sampled_from(STRANGE)


def outcome(path: Path, size: int, use: Callable[[], object]) -> str:
    """The line of an InputError, "" where none was raised; anything else that is raised is a fault."""
    line = ""
    tracemalloc.start()
    try:
        use()
    except InputError as error:
        line = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= BYTES_AT_LEAST + BYTES_PER_BYTE * size, f"{peak} bytes of memory for a file of {size}: {line}"
    assert line == "" or (line.isprintable() and str(path) in line), line
    return line


def read_everything(path: Path, kind: Callable[[Path], SafetensorsFile | GgufFile]) -> None:
    file = kind(path)
    for name, found in file.entries.items():
        assert file.read(name).nbytes == found.nbytes
    file.close()


def encode(model: Path) -> None:
    """Load the tokenizer and use it; what it cannot do with a text is an error of the text."""
    tokenizer = load_tokenizer(model)
    with contextlib.suppress(InputError):
        tokenizer.encode("a <s> b</s>")


def mutated(content: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    data = bytearray(content)
    for action, place, new in changes:
        at = place % (len(data) + 1)
        if action == "put":
            data[at : at + len(new)] = new
        elif action == "insert":
            data[at:at] = new
        elif action == "delete":
            del data[at : at + len(new)]
        else:
            del data[at:]
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The paths to all values within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        for rest in places(inner):
            yield (key, *rest)


def with_evil(data: st.DataObject, value: Any) -> str:
    """JSON text in which some values are replaced, removed, renamed, or there twice."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3]))):
        if not (all_places := list(places(value))):
            break
        *above, last = data.draw(st.sampled_from(all_places))
        holder = value
        for key in above:
            holder = holder[key]
        action = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if action == "replace":
            holder[last] = copy.deepcopy(data.draw(EVIL_VALUES))
        elif action == "remove" or isinstance(holder, list):
            del holder[last]
        else:
            holder[data.draw(EVIL_TEXTS)] = holder.pop(last)
    found = json.dumps(value)
    return found.replace("{", '{"a": 1, "a": 2, ', 1) if data.draw(st.integers(0, 20)) == 0 else found
