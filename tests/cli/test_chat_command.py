"""`quantlab chat` by a pipe: messages, commands, files, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_processes import Run, environment

PLAIN = "[the model has no chat template; it reads plain lines that begin with User: and Assistant:]\n"
Talk = Callable[..., Any]


@pytest.fixture
def talk(run: Run, llama_model: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """A function (text on stdin, arguments) -> how `quantlab chat` with the tiny Llama ended."""

    def talk(text: str | bytes, *arguments: object, model: Path = llama_model) -> Any:
        data = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return run("chat", model, "-n", 8, "-t", 1, *arguments)

    return talk


@pytest.fixture
def refused(talk: Talk) -> Callable[..., str]:
    """As `talk`, of a command that ends with status 2: the last line on stderr, without `quantlab: `."""

    def refused(*arguments: object, **options: Any) -> str:
        outcome = talk(*arguments, **options)
        assert outcome.status == 2, outcome.err
        assert "Traceback" not in outcome.err
        return outcome.err.removeprefix(PLAIN).removeprefix("quantlab: ").rstrip("\n")

    return refused


def with_template(model: Path, folder: Path, template: str) -> Path:
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


# Messages.


def test_answers_go_to_stdout(talk: Talk) -> None:
    """Nothing else does, and without a terminal nothing is told of speeds."""
    outcome = talk("Hi\n\nAnd then?\n")
    assert outcome.status == 0
    assert outcome.err == PLAIN
    said = talk("Hi\n\nAnd then?\n", "--json").json["messages"]
    answers = [message["content"].strip() for message in said if message["role"] == "assistant"]
    assert len(answers) == 2
    assert outcome.out == "".join(f"{answer}\n" for answer in answers)


def test_messages_of_several_lines(talk: Talk) -> None:
    r"""Lines that end with \, and blocks between triple quotes; // begins a message with a slash."""
    text = 'one \\\ntwo\\\nthree\n"""a\n\n/b \\\n"""\n"""in one"""\n//etc/hosts\nend\\'
    messages = talk(text, "--json").json["messages"]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    assert asked == ["one \ntwo\nthree", "a\n\n/b \\", "in one", "/etc/hosts", "end"]


def test_a_first_message_by_option(talk: Talk) -> None:
    """Before those of the pipe."""
    messages = talk("And then?\n", "--prompt", "Hi", "--json").json["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["Hi", "And then?"]
    assert talk("", "-p", "Hi").out.strip() == messages[1]["content"].strip()


def test_a_first_message_of_many_lines(talk: Talk) -> None:
    """All of stdin, commands and marks as they are."""
    messages = talk("one\n\n/two \\\n", "-p", "-", "--json").json["messages"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one\n\n/two \\"]
    assert talk("\n", "-p", "-", "--json").json["messages"] == []


def test_drafts_change_no_answer(talk: Talk, llama_model: Path) -> None:
    text = "Hi\nHi\nHi\n/retry\n"
    outcome = talk(text, "--speculation", "off", "--temp", 0)
    assert outcome.status == 0
    for options in (("--speculation", "lookup"), ("--draft-model", llama_model, "--num-draft-tokens", 3)):
        assert talk(text, "--temp", 0, *options).out == outcome.out


def test_torch_may_answer(talk: Talk) -> None:
    """Several turns on the other engine."""
    outcome = talk("Hi\nAnd then?\n/retry\n", "--engine", "torch", "--json").json
    assert (outcome["engine"], outcome["stats"]["answers"], len(outcome["messages"])) == ("torch", 3, 4)


def test_a_gguf_file_brings_its_template(talk: Talk, run: Run, llama_model: Path, tmp_path: Path) -> None:
    """The answers are those of the folder that it was made of."""
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    model = with_template(llama_model, tmp_path / "model", template)
    assert run("export", model, tmp_path / "model.gguf", "--to", "gguf").status == 0
    of_folder, of_file = (talk("Hi\nAnd then?\n", model=path) for path in (model, tmp_path / "model.gguf"))
    assert (of_file.out, of_file.err) == (of_folder.out, "")
    assert len(of_file.out.splitlines()) == 2


def test_one_json_object(talk: Talk, llama_model: Path) -> None:
    """Messages as a file has them, and counts; nothing but it on stdout."""
    result = talk("Hi\n", "--json", "--system", "Be kind.", "--seed", 9).json
    assert [message["role"] for message in result["messages"]] == ["system", "user", "assistant"]
    assert result["messages"][0]["content"] == "Be kind."
    assert (result["model"], result["engine"]) == (str(llama_model), "native")
    stats = result["stats"]
    assert (stats["answers"], stats["generated_tokens"], stats["seed"], stats["context"]) == (1, 8, 9, 128)
    assert stats["context_used"] == stats["prompt_tokens"] + 7


def test_the_models_own_template_is_used(talk: Talk, llama_model: Path, tmp_path: Path) -> None:
    """The same answers as to the text that it writes; --chat-template takes its place."""
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    model = with_template(llama_model, tmp_path / "model", template)
    outcome = talk("Hi\n", model=model)
    assert outcome.err == ""
    (tmp_path / "own.jinja").write_text(template)
    assert talk("Hi\n", "--chat-template", tmp_path / "own.jinja").out == outcome.out
    assert talk("Hi\n").out != outcome.out


def test_a_template_without_a_system_role_is_told_of(talk: Talk, llama_model: Path, tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    )
    model = with_template(llama_model, tmp_path / "model", template)
    told = "[the model's chat template takes no system prompt; it leads the first message instead]\n"
    outcome = talk("Hi\nAnd then?\n", "--system", "Be kind.", model=model)
    assert outcome.err == told
    assert talk("Hi\n", model=model).err == ""


# Commands.


def test_undo_and_retry(talk: Talk) -> None:
    outcome = talk("Hi\n/retry\n/retry\n/undo\nHo\n/stats\n", "--json", "--temp", 1, "--seed", 3)
    assert outcome.err.startswith(f"{PLAIN}[seed 4]\n[seed 5]\n[forgotten: Hi]\n")
    assert "answers     4, 0 of them stopped\n" in outcome.err
    assert [m["content"] for m in outcome.json["messages"] if m["role"] == "user"] == ["Ho"]
    answers = talk("Hi\n/retry\n", "--temp", 1).out.splitlines()
    assert talk("Hi\n", "--temp", 1, "--seed", 1).out.splitlines() == answers[-1:]
    assert "at temperature 0 every seed gives the same answer" in talk("Hi\n/retry\n", "--temp", 0).err


def test_the_system_prompt(talk: Talk) -> None:
    outcome = talk('/system\n/system Be kind.\nHi\n/system\n/system ""\n', "--json")
    none = '[no system prompt; /system TEXT gives one, /system "" takes it away]\n'
    assert outcome.err == f"{PLAIN}{none}Be kind.\nBe kind.\n{none}"
    assert [m["role"] for m in outcome.json["messages"]] == ["user", "assistant"]


def test_settings(talk: Talk) -> None:
    outcome = talk("/set temp 0.5\n/set top_k=7\n/set max-tokens 3\nHi\n/set\n", "--json")
    assert outcome.err.startswith(f"{PLAIN}temp 0.5\ntop-k 7\nmax-tokens 3\n")
    assert "temp 0.5\ntop-k 7\ntop-p 0.95\nmin-p 0.05\nseed 0\nmax-tokens 3\n" in outcome.err
    assert outcome.json["stats"]["generated_tokens"] == 3


def test_a_conversation_goes_on_from_a_file(talk: Talk, llama_model: Path, tmp_path: Path) -> None:
    """With its parameters, as if it had never been interrupted."""
    file = tmp_path / "talk.json"
    whole = talk("Hi\n/set temp 1.5\n/set seed 4\nAnd then?\n").out.splitlines(keepends=True)
    begun = talk(f'/system Be kind.\n/system ""\nHi\n/set temp 1.5\n/set seed 4\n/save {file}\n/save\n')
    assert begun.err.endswith(f"[2 messages in {file}]\n" * 2)
    content = json.loads(file.read_text())
    assert (content["model"], content["sampling"]["temperature"], content["max_tokens"]) == (str(llama_model), 1.5, 8)
    for text, options in ((f"/load {file}\nAnd then?\n", ()), ("And then?\n", ("--load", file))):
        went_on = talk(text, *options)
        assert went_on.err == f"{PLAIN}[2 messages from {file}]\n"
        assert begun.out + went_on.out == "".join(whole)


def test_parameters_for_another_model(run: Run, refusal: Callable[..., str], llama_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text('{"messages": [], "sampling": {"logit_bias": {"512": 1}}}')
    found = run("chat", llama_model, "--load", file)
    assert found.status == 2
    assert "talk.json: its sampling parameters are for another model: logit bias: token id 512 is outside" in found.err
    assert "logit bias: token id 600 is outside" in refusal("chat", llama_model, "--logit-bias", "600=1")


def test_a_file_of_others(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text('{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]}')
    outcome = talk("/retry\n/clear\n", "--load", file, "--json")
    assert outcome.err == (
        f"{PLAIN}[1 message from {file}]\n[the last one has no answer yet; /retry asks for it]\n"
        "[the conversation is empty; the system prompt stays]\n"
    )
    assert outcome.json["messages"] == [{"role": "system", "content": "Be kind."}]
    assert outcome.json["stats"]["answers"] == 1
    other = tmp_path / "other.json"
    other.write_text('{"messages": [], "model": "another"}')
    assert "[they were had with another]" in talk("", "--load", other).err


def test_help_names_every_command(talk: Talk) -> None:
    from quantlab.cli.chat_commands import COMMANDS

    err = talk("/help\n/quit\nnever read\n").err
    assert [line.split()[0] for line in err.splitlines() if line.startswith("/")] == list(COMMANDS)
    assert err.count("\n\n") == 1


def test_the_oldest_messages_are_left_out(talk: Talk) -> None:
    """And that is told; or the next one is refused."""
    text = "Where do the ships of the king go in the night?\n" * 5
    outcome = talk(text, "--json")
    assert outcome.status == 0
    assert "[the context is full: the 4 messages at the beginning left out]" in outcome.err
    assert len(outcome.json["messages"]) == 10
    refused = talk(text, "--on-overflow", "refuse")
    assert refused.status == 2
    assert "/undo or /clear, or let the oldest messages be left out (--on-overflow drop)" in refused.err


# What is refused.


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("/undo\n", "there is no message yet"),
        ("/retry\n", "there is no message yet"),
        ("/nothing of the kind\n", "/nothing: no such command; /help lists them, and // begins a message with a slash"),
        ("/save\n", "/save FILE: name a file"),
        ("/load\n", "/load FILE: name a file"),
        ("/set heat 3\n", "/set heat: choose one of: repetition-penalty, "),
        ("/set top-k 1.5\n", "/set top-k 1.5: a whole number is expected, as in /set top-k 40"),
        ("/set temp\n", "/set temp: a number is expected, as in /set temp 0.8"),
        ("/set temp -1\n", "temperature must be 0 or more"),
        ("/set max-tokens 0\n", "max-tokens 0: at least one token must be asked for"),
        ("Where do the ships go? " * 50, "the message has "),
        ('"""a\nb', 'the block that begins with """ has no end: a line that ends with """'),
        (b"\xff\n", "standard input is not UTF-8 text"),
    ],
)
def test_a_wrong_line_of_a_pipe_ends_the_chat(refused: Callable[..., str], text: str | bytes, line: str) -> None:
    """One line, status 2: nobody is there to try again."""
    told = refused(text)
    assert told.startswith(line)
    assert "\n" not in told


def test_wrong_options(refused: Callable[..., str], tmp_path: Path, llama_model: Path) -> None:
    broken, other = tmp_path / "broken.jinja", tmp_path / "other.json"
    broken.write_text("{% for m in messages %}")
    other.write_text("[]")
    assert refused("Hi\n", "--chat-template", broken).startswith(f"{broken}: is no template that Jinja reads: ")
    assert refused("Hi\n", "--chat-template", tmp_path / "no").startswith(f"{tmp_path / 'no'}: ")
    assert refused("Hi\n", "--on-overflow", "shift") == "on-overflow 'shift': choose one of: drop, refuse"
    assert refused("Hi\n", "-n", 0) == "max-tokens 0: at least one token must be asked for"
    assert refused("Hi\n", "--load", other).startswith(f"{other}: no conversation; ")
    assert refused("Hi\n", "--system", "\udcff") == "--system is not UTF-8 text"
    assert refused("Hi\n", "--stop", "") == "a stop string is empty"
    assert refused("Hi\n", model=tmp_path).startswith(f"{tmp_path}: holds no tokenizer")
    model = with_template(llama_model, tmp_path / "model", "{{ raise_exception('never') }}")
    assert refused("Hi\n", model=model).endswith("the model's chat template fails on these messages: never")


def test_no_standard_input(run: Run, llama_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    outcome = run("chat", llama_model)
    assert outcome.status == 2
    assert outcome.err == f"{PLAIN}quantlab: standard input is closed; messages come from there\n"


def test_the_native_engine_needs_no_torch(llama_model: Path) -> None:
    code = (
        "import sys; from quantlab.cli import _run; status = _run(); "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'imported'; sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "chat", str(llama_model), "-n", "2"]
    done = subprocess.run(command, input="Hi\n/stats\n", capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    assert "answers     1," in done.stderr
