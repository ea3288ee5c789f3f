"""Reasoning apart from the answer: what a model writes between <think> and </think>, as it comes."""

from __future__ import annotations

from quantlab.checkpoint import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


def marks_reasoning(template: str | None, tokenizer: Tokenizer) -> bool:
    """Whether a model's template or vocabulary knows the marks."""
    return CLOSE in (template or "") or tokenizer.backend.token_to_id(CLOSE) is not None


class ReasoningSplit:
    """Parts a text, piece by piece; white space around the marks goes.

    Args:
        is_inside: the prompt has opened the reasoning.
    """

    def __init__(self, *, is_inside: bool) -> None:
        self._state = "inside" if is_inside else "before"
        self._held = ""
        self._has_reasoned = False

    def add(self, piece: str) -> tuple[str, str]:
        """What is certain now, of the reasoning and of the answer."""
        self._held += piece
        reasoning = ""
        if self._state == "before":
            self._begin()
        if self._state == "inside":
            reasoning = self._inside()
        return reasoning, self._after() if self._state in ("between", "after") else ""

    def rest(self) -> tuple[str, str]:
        """What is left, at the end of the text."""
        held, self._held = self._held, ""
        if self._state == "between":
            return "", ""
        return (held.rstrip(), "") if self._state == "inside" else ("", held)

    def _begin(self) -> None:
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._state, self._held = "inside", text.removeprefix(OPEN)
        elif not OPEN.startswith(text):
            self._state = "after"

    def _inside(self) -> str:
        if not self._has_reasoned:
            self._held = self._held.lstrip()
        reasoning, found, answer = self._held.partition(CLOSE)
        if found:
            self._state, self._held = "between", answer
            return reasoning.rstrip()
        keep = len(reasoning.rstrip())  # white space may turn out to be the end
        for size in range(1, len(CLOSE)):
            if reasoning.endswith(CLOSE[:size]):
                keep = len(reasoning[:-size].rstrip())
        self._held = reasoning[keep:]
        self._has_reasoned = self._has_reasoned or keep > 0
        return reasoning[:keep]

    def _after(self) -> str:
        if self._state == "between":
            self._held = self._held.lstrip()
            self._state = "after" if self._held else "between"
        text, self._held = self._held, ""
        return text


def split_reasoning(text: str, *, is_inside: bool) -> tuple[str | None, str]:
    """Reasoning and answer of a whole text; None where there is no reasoning."""
    split = ReasoningSplit(is_inside=is_inside)
    parts = [split.add(text), split.rest()]
    reasoning = "".join(part for part, _ in parts)
    return reasoning or None, "".join(part for _, part in parts)
