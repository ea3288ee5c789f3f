"""A prompt as pieces, and the two ways to write it: messages for a model's chat template, plain text without one."""

from __future__ import annotations

from dataclasses import dataclass

Message = dict[str, str]  # role and content


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        question: the question itself.
        system: how the model is to behave; empty for nothing.
        shown: worked examples before it, each a question and its answer.
        context: what precedes the question: numbered sources and what to do with them.
        begun: the words that the answer begins with. They are put before the model's own.
        is_whole: the question is all of the text and is written without Q and A where there is no chat template.
    """

    question: str
    system: str = ""
    shown: tuple[tuple[str, str], ...] = ()
    context: str = ""
    begun: str = ""
    is_whole: bool = False


def messages(prompt: Prompt) -> list[Message]:
    """Roles and contents, without `begun`, which belongs to the answer."""
    written = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for question, answer in prompt.shown:
        written += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = "\n\n".join(part for part in (prompt.context, prompt.question) if part)
    return [*written, {"role": "user", "content": asked}]


def plain_text(prompt: Prompt) -> str:
    """The text that a model without a chat template continues: Q and A by lines (Kojima et al. 2022)."""
    system = f"{prompt.system}\n\n" if prompt.system else ""
    shown = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in prompt.shown)
    context = f"{prompt.context}\n\n" if prompt.context else ""
    if prompt.is_whole:
        return f"{system}{shown}{context}{prompt.question}{prompt.begun}"
    begun = f" {prompt.begun}" if prompt.begun else ""
    return f"{system}{shown}{context}Q: {prompt.question}\nA:{begun}"


def without_system(prompt: list[Message]) -> list[Message]:
    """The same messages with the system's put before the user's first, for templates that know no system."""
    system, *rest = prompt
    first = next(number for number, message in enumerate(rest) if message["role"] == "user")
    content = f"{system['content']}\n\n{rest[first]['content']}"
    return [*rest[:first], {"role": "user", "content": content}, *rest[first + 1 :]]
