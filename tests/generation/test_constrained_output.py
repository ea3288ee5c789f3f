"""Constrained output: what a schema, an expression, choices or a grammar describe, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlab import InputError, generate, quantize_checkpoint
from quantlab.checkpoint import Tokenizer, load_tokenizer
from quantlab.checkpoint.export import export_checkpoint
from quantlab.generation.generator import Completion, complete
from quantlab.generation.grammar_constraint import GrammarConstraint, GrammarTokens
from quantlab.generation.grammars import (
    Grammar,
    choice_grammar,
    json_schema_grammar,
    read_grammar,
    read_json_schema,
    regex_grammar,
)
from quantlab.generation.native_engine import NativeEngine, load_native
from quantlab.generation.reasoned_answer import complete_reasoned
from quantlab.generation.samples import generate_many
from quantlab.generation.sampling import SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colours": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}
PATTERN = r"[a-z]{3,8} [0-9]{2}\."
CHOICES = ["yes", "no", 'may"be\n', "yes, but"]
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"name", "age", "colours"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and 1 <= len(value["colours"]) <= 3
        and set(value["colours"]) <= {"red", "green"}
        and text == json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    )


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny packed Llama whose logits have more columns than the tokenizer has tokens, as many models have."""
    folder = tmp_path_factory.mktemp("constrained")
    make_model(folder / "float", "llama", vocab_size=544)
    quantize_checkpoint(folder / "float", folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> NativeEngine:
    return load_native(folder, threads=1)


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer, engine: NativeEngine) -> GrammarTokens:
    assert tokenizer.size < engine.vocabulary
    return GrammarTokens(tokenizer, engine.vocabulary)


@pytest.fixture(scope="module")
def written(engine: NativeEngine, tokenizer: Tokenizer, tokens: GrammarTokens):
    """A function (grammar, settings) -> completion."""

    def write(grammar: Grammar, **others) -> Completion:
        return complete(
            engine,
            tokenizer,
            "The lamp:",
            constraint=GrammarConstraint(tokens, grammar),
            **{"max_tokens": 100, **others},
        )

    return write


# What comes out.


@given(
    case=st.sampled_from(["schema", "regex", "choices"]),
    temperature=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 99),
    speculation=st.sampled_from(["auto", "lookup"]),
)
@PROPERTY
def test_outputs_are_what_was_asked_for(written, case: str, temperature: float, seed: int, speculation: str) -> None:
    """And the same with speculation, to which the grammar contributes, and without."""
    grammar = {
        "schema": lambda: json_schema_grammar(PERSON),
        "regex": lambda: regex_grammar(PATTERN),
        "choices": lambda: choice_grammar(CHOICES),
    }[case]()
    params = SamplingParams(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
    plain = written(grammar, params=params, speculation="off")
    if plain.finish_reason == "stop":
        is_right = {
            "schema": is_person,
            "regex": lambda text: re.fullmatch(PATTERN, text),
            "choices": lambda text: text in CHOICES,
        }[case]
        assert is_right(plain.text)
    else:
        assert len(plain.token_ids) == 100
    assert plain.finish_reason == "stop" or case == "schema"
    fast = written(grammar, params=params, speculation=speculation)
    assert (fast.token_ids, fast.text, fast.finish_reason) == (plain.token_ids, plain.text, plain.finish_reason)


def test_what_a_grammar_forces_is_drafted(written) -> None:
    """The words of a text that has no choice, without a pass for each of its tokens."""
    sentence = "the lamp in the boathouse was lit every evening by the keeper of the harbour"
    completion = written(regex_grammar(sentence), speculation="auto")
    assert (completion.text, completion.finish_reason) == (sentence, "stop")
    assert completion.timings.accepted_tokens > 0


def test_the_end_token_is_allowed_only_where_the_text_may_end(tokens: GrammarTokens, tokenizer: Tokenizer) -> None:
    """And columns of the logits without a token never."""
    constraint = GrammarConstraint(tokens, regex_grammar("a+b?"))
    (end,) = tokenizer.eos
    letter = {name: tokenizer.backend.token_to_id(name) for name in "ab"}
    assert (constraint.allowed().shape, constraint.allowed().dtype) == ((544,), np.bool_)
    assert not constraint.allowed()[end]
    constraint.take(letter["a"])
    assert constraint.allowed()[[end, letter["a"], letter["b"]]].all()
    assert not constraint.allowed()[512:].any()
    assert not constraint.finished
    constraint.take(letter["b"])
    assert constraint.finished


def test_without_an_end_token_only_a_complete_text_ends(engine: NativeEngine, tokenizer: Tokenizer) -> None:
    """llguidance's guess at one is not taken for the model's."""
    endless = GrammarTokens(Tokenizer(tokenizer.backend, tokenizer.bos, frozenset()), engine.vocabulary)
    constraint = GrammarConstraint(endless, regex_grammar("a+b"))
    constraint.take(tokenizer.backend.token_to_id("a"))
    (end,) = tokenizer.eos
    assert not constraint.allowed()[end]


def test_a_cut_output_is_told_of(written) -> None:
    """It may be no JSON yet."""
    cut = written(json_schema_grammar(PERSON), max_tokens=5)
    assert cut.finish_reason == "length"
    with pytest.raises(ValueError):
        json.loads(cut.text)


def test_characters_without_a_token_are_written_by_bytes(written) -> None:
    """Of a SentencePiece vocabulary with byte tokens."""
    assert written(choice_grammar(["\u65e5\u672c \U0001f600"])).text == "\u65e5\u672c \U0001f600"


def test_a_gguf_file_is_constrained_likewise(folder: Path, tmp_path: Path) -> None:
    export_checkpoint(folder, tmp_path / "model.gguf", "gguf")
    found = [
        generate(model, "The lamp:", grammar=json_schema_grammar(PERSON), max_tokens=100)
        for model in (folder, tmp_path / "model.gguf")
    ]
    assert found[0].token_ids == found[1].token_ids
    assert found[0].finish_reason == "length" or is_person(found[0].text)


def test_samples_are_constrained_each_for_itself(folder: Path) -> None:
    """Each is the text of its own seed."""
    grammar, params = regex_grammar(PATTERN), SamplingParams(temperature=2.0, seed=7)
    several = generate_many(folder, "The lamp:", 3, grammar=grammar, params=params)
    alone = [generate(folder, "The lamp:", grammar=grammar, params=replace(params, seed=7 + i)) for i in range(3)]
    assert [each.token_ids for each in several.samples] == [each.token_ids for each in alone]
    assert all(re.fullmatch(PATTERN, each.text) for each in several.samples)


def test_a_byte_level_tokenizer_is_constrained_likewise(make_model, tmp_path: Path) -> None:
    """GPT-2's kind, whose tokens are spelled in letters that stand for bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=letters)
    backend.train_from_iterator(["the lamp was lit, the lamp was not"] * 9, trainer)
    tokenizer = Tokenizer(backend, None, frozenset({0}))
    engine = load_native(make_model(tmp_path / "model", "gpt2"), threads=1)
    constraint = GrammarConstraint(
        GrammarTokens(tokenizer, engine.vocabulary), choice_grammar(["no \u65e5", "the lamp"])
    )
    completion = complete(engine, tokenizer, "the", constraint=constraint)
    assert completion.text in ("no \u65e5", "the lamp")


# Reasoning first.


def reasoned(engine, tokenizer, tokens, **others) -> Completion:
    constraint = GrammarConstraint(tokens, choice_grammar(["yes", "no"]))
    settings_of = {"reasoning_budget": 20, "max_tokens": 10, "params": SamplingParams(seed=5), **others}
    return complete_reasoned(engine, tokenizer, "The lamp", constraint, **settings_of)


def test_an_answer_follows_free_reasoning(engine: NativeEngine, tokenizer: Tokenizer, tokens: GrammarTokens) -> None:
    """The reasoning is what is written without a constraint, and the answer that of the text with the cue."""
    pieces: list[str] = []
    free = complete(engine, tokenizer, "The lamp", max_tokens=20, params=SamplingParams(seed=5))
    both = reasoned(engine, tokenizer, tokens, on_text=pieces.append)
    assert both.reasoning == free.text
    assert both.text in ("yes", "no")
    assert both.finish_reason == "stop"
    assert "".join(pieces) == f"{both.reasoning}\nAnswer: {both.text}"
    assert both.timings.generated_tokens == 20 + len(both.token_ids)
    assert both.timings.prompt_tokens == free.timings.prompt_tokens
    text = [*tokenizer.encode("The lamp"), *free.token_ids]
    assert engine.tokens[: len(text)] == text
    whole = tokenizer.decode([*engine.tokens, both.token_ids[-1]])
    assert whole == f"The lamp{both.reasoning}\nAnswer: {both.text}"


def test_reasoning_ends_at_a_stop_string_or_an_end_token(
    engine: NativeEngine, tokenizer: Tokenizer, tokens: GrammarTokens
) -> None:
    """Neither is a part of what the answer follows."""
    free = complete(engine, tokenizer, "The lamp", max_tokens=20, params=SamplingParams(seed=5))
    for begin, end in ((4, 6), (5, 9), (0, 2), (11, 12)):
        stop = free.text[begin:end]
        both = reasoned(engine, tokenizer, tokens, stop=[stop])
        assert both.reasoning == free.text[: free.text.index(stop)]
        whole = tokenizer.decode([*engine.tokens, both.token_ids[-1]])
        assert whole == f"The lamp{both.reasoning}\nAnswer: {both.text}"
    end_place = free.token_ids.index(free.token_ids[7])
    ending = Tokenizer(tokenizer.backend, tokenizer.bos, tokenizer.eos | {free.token_ids[7]})
    before = [*tokenizer.encode("The lamp"), *free.token_ids[:end_place]]
    both = reasoned(engine, ending, tokens)
    assert engine.tokens[: len(before)] == before
    assert f"The lamp{both.reasoning}" == tokenizer.decode(before)


def test_reasoning_needs_room(engine: NativeEngine, tokenizer: Tokenizer, tokens: GrammarTokens) -> None:
    """Half of what is left at least is the answer's."""
    with pytest.raises(InputError, match="a context of 128 leaves no room to reason and answer"):
        reasoned(engine, tokenizer, tokens, cue="x " * 200)
    with pytest.raises(InputError, match="reasoning budget 0: at least one token is needed"):
        reasoned(engine, tokenizer, tokens, reasoning_budget=0)
    for most in (10, 100, 1000):
        both = reasoned(engine, tokenizer, tokens, max_tokens=most, reasoning_budget=1000)
        assert (both.text in ("yes", "no"), both.finish_reason) == (True, "stop")


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: regex_grammar("[0-9]+("), r"regular expression \[0-9\]\+\(: unclosed group"),
        (lambda: regex_grammar("a(?=b)"), "look-around, .* is not supported"),
        (lambda: json_schema_grammar({"type": "integer", "minimum": 5, "maximum": 3}), "minimum .5. is greater"),
        (lambda: json_schema_grammar({"enum": []}), "the JSON schema: Unsatisfiable"),
        (lambda: json_schema_grammar(False), "the JSON schema: no output can meet it"),
        (lambda: json_schema_grammar({"type": "strin"}), "the JSON schema: Invalid type: strin"),
        (lambda: choice_grammar([]), "choices: at least one is needed"),
        (lambda: choice_grammar(["a", ""]), "choices: at least one is needed, and none may be empty"),
    ],
)
def test_what_nothing_can_meet_is_refused_in_one_line(make, message: str) -> None:
    """Before a model is loaded."""
    with pytest.raises(InputError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_an_expression_that_matches_nothing_is_found_with_the_vocabulary(written) -> None:
    with pytest.raises(InputError, match=r"regular expression \[\^\\s\\S\]: no output can meet it"):
        written(regex_grammar(r"[^\s\S]"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b"3", "a JSON schema is an object, true or false"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"type": "object", "required": ["a"], "properties": {"a": false}}', "'a' is unsatisfiable"),
    ],
)
def test_a_file_that_holds_no_schema_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "schema.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"^{file}: .*{message}"):
        read_json_schema(file)
    with pytest.raises(InputError, match=r"missing\.json"):
        read_json_schema(tmp_path / "missing.json")


def test_a_grammar_is_read_from_a_file(tmp_path: Path, written) -> None:
    file = tmp_path / "sum.lark"
    file.write_text('start: NUMBER " + " NUMBER\nNUMBER: /[1-9][0-9]?/\n', encoding="utf-8")
    assert re.fullmatch(r"[1-9]\d? \+ [1-9]\d?", written(read_grammar(file)).text)
    file.write_text("start: foo", encoding="utf-8")
    with pytest.raises(InputError, match='unknown name: "foo"'):
        read_grammar(file)


# The command.


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantlab.cli", "generate", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_takes_schemas_and_reasoning(folder: Path, tmp_path: Path) -> None:
    """The answer alone is `text`; torch and transformers are not imported."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "integer", "minimum": 1, "maximum": 40}', encoding="utf-8")
    done = run_command(str(folder), "-p", "The lamp:", "--json-schema", str(schema), "--json")
    assert done.returncode == 0, done.stderr
    assert 1 <= json.loads(json.loads(done.stdout)["text"]) <= 40
    done = run_command(
        str(folder), "-p", "The lamp", "--then-json-schema", str(schema), "--reasoning-budget", "9", "--then-cue",
        r"\nSo: ",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"\nSo: \d+$", done.stdout.rstrip("\n"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "a", "--choices", "a,b"], "--regex and --choices: one of them describes the output"),
        (["--regex", "a", "--then-regex", "b"], "the text or the answer is constrained, not both"),
        (["--reasoning-budget", "5"], "--reasoning-budget means nothing without --then-json-schema or its like"),
        (["--template", "cot", "--regex", "a"], "--regex is for a plain prompt; leave it or --template out"),
        (["--choices", "a,,b"], "none may be empty"),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder: Path, options: list[str], message: str) -> None:
    done = run_command(str(folder), "-p", "The lamp", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
