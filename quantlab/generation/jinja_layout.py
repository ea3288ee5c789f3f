"""A user's own prompt template: a Jinja file, rendered in the sandbox of chat templates.

What it renders is the user's message. Blocks say more: `system`, `user`, `answer` (the words that the answer begins
with) and `then` (what asks for the answer behind the reasoning, in a second step).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.documents import read_text
from quantlab.errors import InputError

VARIABLES = {
    "question": "the question, with its choices",
    "passages": "of source and text each",
    "examples": "of question, answer and reasoning each",
    "role": "of --role",
    "choices": "texts",
}
BLOCKS = ("system", "user", "answer", "then")


@dataclass(frozen=True)
class WrittenLayout:
    """What a file makes of a question; `is_whole` where it has no blocks."""

    user: str
    system: str = ""
    answer: str = ""
    then: str | None = None
    is_whole: bool = False


@dataclass(frozen=True)
class JinjaLayout:
    """A template's text, the variables that it uses, and its file's name for messages."""

    text: str
    variables: frozenset[str]
    where: str

    def written(self, **values: Any) -> WrittenLayout:
        """The pieces for these variables.

        Raises:
            InputError: the template fails on them, or makes no text.
        """
        from jinja2 import TemplateError

        from quantlab.checkpoint.chat_environment import FAULTS, compiled

        template = compiled(self.text, strict=True)
        try:
            context = template.new_context(values)
            parts = {name: "".join(block(context)) for name, block in template.blocks.items()}
            written = _pieces(parts) if parts else WrittenLayout(template.render(values), is_whole=True)
        except (TemplateError, *FAULTS) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.where}: fails on this question: {reason}; {_told_variables()}") from None
        if not written.user.strip():
            raise InputError(f"{self.where}: makes an empty prompt")
        return written


def read_layout(path: Path) -> JinjaLayout:
    """A template from its file.

    Raises:
        InputError: the file cannot be read, is no template, or uses a variable or block that there is not.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    from quantlab.checkpoint.chat_environment import block_names, variables_of

    text = read_text(path)
    try:
        variables, blocks = variables_of(text), block_names(text)
    except TemplateError as error:
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        raise InputError(f"{path}: {line}is no template that Jinja reads: {error}") from None
    if unknown := sorted(variables - VARIABLES.keys()):
        raise InputError(f"{path}: undefined variable {', '.join(unknown)}; {_told_variables()}")
    if strange := sorted(set(blocks) - set(BLOCKS)):
        raise InputError(f"{path}: unknown block {', '.join(strange)}; there are: {', '.join(BLOCKS)}")
    if blocks and "user" not in blocks:
        raise InputError(f"{path}: has blocks, but none named user, which is to hold the question")
    return JinjaLayout(text, frozenset(variables), str(path))


def _pieces(parts: dict[str, str]) -> WrittenLayout:
    return WrittenLayout(
        parts["user"].strip("\n"),
        parts.get("system", "").strip("\n"),
        parts.get("answer", "").strip("\n"),
        parts["then"].removesuffix("\n") if "then" in parts else None,
    )


def _told_variables() -> str:
    return "the variables are " + ", ".join(f"{name} ({meaning})" for name, meaning in VARIABLES.items())
