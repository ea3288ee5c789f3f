"""YAML as a tree that remembers its lines, so that whatever is wrong can be found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantlab.errors import InputError

MOST_NODES = 20_000  # aliases make small files large
MOST_DEPTH = 32


@dataclass(frozen=True)
class Node:
    """A value of the file: a scalar, a list of nodes, or a mapping from text to nodes.

    Attributes:
        line: where it begins, from 1.
        path: its keys from the top, such as "models[1].parameters".
    """

    value: Any
    line: int
    path: str = ""

    def __str__(self) -> str:
        return f"line {self.line}: {self.path}" if self.path else f"line {self.line}"


def read_yaml(text: str, source: str) -> Node:
    """Read the one document of a YAML text.

    Raises:
        InputError: it is none; a key that is no text or is there twice; aliases that make it endless.
    """
    import yaml

    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise InputError(f"{source}: is empty")
        return _Reader(loader, source).node(root, "", 0)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not a YAML file: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


class _Reader:
    def __init__(self, loader: Any, source: str) -> None:  # Any: yaml has no types here
        self._loader, self._source, self._nodes = loader, source, 0

    def node(self, node: Any, path: str, depth: int) -> Node:
        import yaml

        self._nodes += 1
        line = node.start_mark.line + 1
        if self._nodes > MOST_NODES or depth > MOST_DEPTH:
            raise InputError(f"{self._source}: line {line}: is nested too deeply, or its aliases make it too large")
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, path, depth), line, path)
        if isinstance(node, yaml.SequenceNode):
            items = [self.node(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(node.value)]
            return Node(items, line, path)
        return Node(self._loader.construct_object(node), line, path)

    def _mapping(self, node: Any, path: str, depth: int) -> dict[str, Node]:
        own = {id(key) for key, _ in node.value}
        self._loader.flatten_mapping(node)  # what `<<: *alias` stands for, before the mapping's own keys
        found: dict[str, Node] = {}
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key, line = self._loader.construct_object(key_node), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise InputError(f"{self._source}: line {line}: the key {key!r} is no text; put it in quotes")
            if id(key_node) in own and key in seen:
                raise InputError(f"{self._source}: line {line}: {key} is there twice; keep one")
            if id(key_node) in own:
                seen.add(key)
            found[key] = self.node(value_node, f"{path}.{key}" if path else key, depth + 1)
        return found
