"""What `/word` does in a chat: one table row and one function each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.cli.chat_documents import ChatDocuments
from quantlab.cli.chat_view import ChatView
from quantlab.cli.passage_search import METHOD, PASSAGES, passage_search

if TYPE_CHECKING:
    from quantlab.generation.chat import Answer, Chat

# What `/set` calls the sampling parameters that the options of the command call otherwise.
_SHORT = {"temp": "temperature"}
_ROUNDED = 1  # digit of speeds


@dataclass
class ChatSession:
    """A chat on a command line.

    Attributes:
        model: its name.
        file: what `/save` writes without being told a name.
        documents: what questions are answered from; None for what the model knows by itself.
        sources: of the last answer's passages, by number from 1.
    """

    chat: Chat
    view: ChatView
    model: str
    file: Path | None = None
    documents: ChatDocuments | None = None
    sources: tuple[str, ...] = ()

    def answer(self, question: str) -> None:
        """Ask a question, and show the answer and where its passages come from.

        Raises:
            InputError: as `Chat.ask` and `ChatDocuments.put_before`.
        """
        sources: tuple[str, ...] = ()
        if self.documents is not None:
            question, sources = self.documents.put_before(question, self.chat)
        self.show(self.chat.ask(question, self.view.piece, self.view.reading))
        self.sources = sources
        if self.documents is not None:
            listed = [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
            self.view.note("\n".join(listed) or "[no passage was found]")

    def show(self, answer: Answer) -> None:
        """End an answer that has been written."""
        self.view.end(answer, self.chat.max_tokens, self.chat.params.seed)
        if answer.dropped:
            self.view.note(f"[the context is full: the {_messages(answer.dropped)} at the beginning left out]")


class Leave(Exception):  # noqa: N818 - no error
    """The user has had enough."""


def run_command(session: ChatSession, line: str) -> None:
    """Do what a line that begins with a slash asks for.

    Raises:
        InputError: there is no such command, or it cannot be done; nothing has changed.
        Leave: it is /quit.
    """
    from quantlab.errors import InputError

    word, _, argument = line.strip().partition(" ")
    if word not in COMMANDS:
        raise InputError(f"{word}: no such command; /help lists them, and // begins a message with a slash")
    COMMANDS[word].run(session, argument.strip())


def _help(session: ChatSession, argument: str) -> None:
    width = max(len(f"{word} {command.argument}") for word, command in COMMANDS.items())
    lines = [f"{f'{word} {command.argument}':{width}}  {command.help}" for word, command in COMMANDS.items()]
    lines += [
        "",
        r"A line that ends with \ goes on in the next; a block begins and ends with "
        '""". // begins a message with a slash.',
        "Ctrl-C stops an answer, or clears the line; twice at an empty line, or Ctrl-D, leaves.",
    ]
    session.view.note("\n".join(lines))


def _undo(session: ChatSession, argument: str) -> None:
    from quantlab.generation.chat_sources import shown_question

    question = " ".join(shown_question(session.chat.undo()).split())
    session.view.note(f"[forgotten: {question[:60]}{'...' if len(question) > 60 else ''}]")


def _retry(session: ChatSession, argument: str) -> None:
    if session.chat.params.temperature == 0:
        session.view.note("[at temperature 0 every seed gives the same answer; /set temp 0.8]")
    session.show(session.chat.retry(session.view.piece, session.view.reading))


def _system(session: ChatSession, argument: str) -> None:
    conversation = session.chat.conversation
    if argument:
        conversation.system = None if argument == '""' else argument
    session.view.note(conversation.system or '[no system prompt; /system TEXT gives one, /system "" takes it away]')


def _set(session: ChatSession, argument: str) -> None:
    name, _, text = argument.replace("=", " ", 1).partition(" ")
    if not name:
        session.view.note("\n".join(f"{name} {value}" for name, value in _settings(session.chat).items()))
        return
    name, text = name.lower().replace("_", "-"), text.strip()
    value = _setting(session.chat, name, text)
    if name == "max-tokens":
        session.chat.max_tokens = int(value)
    else:
        change: dict[str, Any] = {_SHORT.get(name, name.replace("-", "_")): value}  # Any: fields have several types
        session.chat.params = replace(session.chat.params, **change)
    session.view.note(f"{name} {_settings(session.chat)[name]}")


def _setting(chat: Chat, name: str, text: str) -> float:
    """The value that a text gives a setting, in its type.

    Raises:
        InputError: there is no such setting, or the text is no such number.
    """
    from quantlab.errors import InputError

    settings = _settings(chat)
    if name not in settings:
        raise InputError(f"/set {name}: choose one of: {', '.join(settings)}")
    is_whole = isinstance(settings[name], int)
    try:
        return int(text) if is_whole else float(text)
    except ValueError:
        kind = "whole number" if is_whole else "number"
        raise InputError(
            f"{f'/set {name} {text}'.rstrip()}: a {kind} is expected, as in /set {name} {settings[name]}"
        ) from None


def _settings(chat: Chat) -> dict[str, float]:
    """What `/set` can change, by the names of the command's options."""
    long = {field: name for name, field in _SHORT.items()}
    names = [field.name for field in fields(chat.params) if field.name != "logit_bias"]
    values = {long.get(name, name.replace("_", "-")): getattr(chat.params, name) for name in names}
    return {**values, "max-tokens": chat.max_tokens}


def _save(session: ChatSession, argument: str) -> None:
    from quantlab.errors import InputError
    from quantlab.generation.conversation_file import SavedConversation, write_conversation

    chat, file = session.chat, Path(argument).expanduser() if argument else session.file
    if file is None:
        raise InputError("/save FILE: name a file")
    conversation = chat.conversation
    saved = SavedConversation(
        conversation.system, conversation.messages, session.model, chat.params, chat.max_tokens
    )  # fmt: skip
    write_conversation(file, saved)
    session.file = file
    session.view.note(f"[{_messages(len(conversation.messages))} in {file}]")


def _load(session: ChatSession, argument: str) -> None:
    from quantlab.errors import InputError

    if not argument:
        raise InputError("/load FILE: name a file")
    load_conversation(session, Path(argument).expanduser())


def load_conversation(session: ChatSession, file: Path) -> None:
    """Go on with the conversation in a file, and with its parameters where it has some.

    Raises:
        InputError: it holds none, or parameters that are not this model's; nothing has changed.
    """
    from quantlab.errors import InputError
    from quantlab.generation.conversation_file import read_conversation

    saved, chat = read_conversation(file), session.chat
    try:
        chat.params = saved.params or chat.params
    except InputError as error:  # biases of another model's tokens
        raise InputError(f"{file}: its sampling parameters are for another model: {error}") from None
    chat.load(saved.system, saved.messages)
    chat.max_tokens = saved.max_tokens or chat.max_tokens
    session.file = file
    session.view.note(f"[{_messages(len(saved.messages))} from {file}]")
    if saved.model is not None and saved.model != session.model:
        session.view.note(f"[they were had with {saved.model}]")
    if saved.messages and saved.messages[-1]["role"] == "user":
        session.view.note("[the last one has no answer yet; /retry asks for it]")


def _docs(session: ChatSession, argument: str) -> None:
    if argument == "off":
        session.documents = None
    elif argument:
        open_documents(session, argument, PASSAGES, METHOD)
    documents = session.documents
    session.view.note(
        "[answers come from the model alone; /docs DIR finds passages in an index]"
        if documents is None
        else f"[answers come from passages of {documents.index}; /docs off ends that]"
    )


def open_documents(session: ChatSession, index: str, count: int, method: str) -> None:
    """Answer questions from `count` passages of an index.

    Raises:
        InputError: there is none, or it cannot be searched.
    """
    session.documents = ChatDocuments(index, passage_search(index, count, method))


def _stats(session: ChatSession, argument: str) -> None:
    chat = session.chat
    stats, last = chat.stats(), chat.last
    lines = [
        f"model       {session.model}, {chat.engine.name} engine",
        f"messages    {len(chat.conversation.messages)}, {stats.left_out} of them left out",
        f"answers     {stats.answers}, {stats.stopped} of them stopped",
        f"context     {stats.context_used} of {stats.context} tokens",
        f"prompts     {stats.prompt_tokens} tokens, {stats.cached_tokens} of them from the cache",
        f"generated   {stats.generated_tokens} tokens",
        f"seed        {stats.seed}",
    ]
    if last is not None and last.timings is not None:
        timings = last.timings
        speeds = round(timings.prefill_tokens_per_second), round(timings.decode_tokens_per_second, _ROUNDED)
        lines.append(f"last speed  {speeds[0]} prompt tokens/s, {speeds[1]} generated/s")
    session.view.note("\n".join(lines))


def _clear(session: ChatSession, argument: str) -> None:
    session.chat.load(session.chat.conversation.system, [])
    session.view.note("[the conversation is empty; the system prompt stays]")


def _quit(session: ChatSession, argument: str) -> None:
    raise Leave


def _messages(count: int) -> str:
    return "1 message" if count == 1 else f"{count} messages"


@dataclass(frozen=True)
class Command:
    """A row of the table."""

    run: Callable[[ChatSession, str], None]
    argument: str
    help: str


COMMANDS = {
    "/help": Command(_help, "", "Show this."),
    "/undo": Command(_undo, "", "Forget the last message and its answer."),
    "/retry": Command(_retry, "", "Answer the last message again, with another seed."),
    "/system": Command(_system, "[TEXT]", 'Replace the system prompt, or show it; "" takes it away.'),
    "/save": Command(_save, "[FILE]", "Write the conversation as JSON; by default to the file of the last time."),
    "/load": Command(_load, "FILE", "Go on with a conversation from a file."),
    "/docs": Command(_docs, "[DIR]", "Answer from passages of what `quantlab index` made; off ends that."),
    "/stats": Command(_stats, "", "Show tokens, speeds, and how full the context is."),
    "/set": Command(_set, "[NAME VALUE]", "Set temp, top-k, max-tokens and the like, or show them."),
    "/clear": Command(_clear, "", "Begin a new conversation."),
    "/quit": Command(_quit, "", "Leave."),
}
