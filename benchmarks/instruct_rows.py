"""The four skills as rows of training data: conversations, and answers that begin with a prompt template's words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import instruct_chat as chat
import instruct_labels as labels
from instruct_arithmetic import OPERATIONS, Chain, draw_chain
from instruct_facts import names
from instruct_grounded import draw_conversation

from quantlab.checkpoint import load_tokenizer
from quantlab.checkpoint.chat_text import read_template, render_chat
from quantlab.generation.kojima import REASONING_TRIGGER, direct_trigger, extraction_trigger
from quantlab.generation.sources import GivenSource, numbered_sources

Row = dict[str, Any]  # as JSON has it
Turn = tuple[str, str]  # what is said, and the answer

ANSWER = "The answer is {}."
NUMBER = direct_trigger("number")
EXTRACT = extraction_trigger("number")
SYSTEM = ("You are a helpful assistant.", "You are fable, a small language model.", "Be brief.")
CHAINS = (2, 3, 4, *(OPERATIONS,) * 9)  # operations, to draw from


def conversation(turns: Sequence[Turn], system: str = "") -> Row:
    """All answers are learned."""
    messages = [{"role": "system", "content": system}] if system else []
    for said, answer in turns:
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


class BegunAnswers:
    """Rows whose answer begins with words of a prompt template, which are given and carry no loss."""

    def __init__(self, model: Path, template: Path) -> None:
        self._tokenizer, self._template = load_tokenizer(model), read_template(template)

    def row(self, said: str, begun: str, rest: str) -> Row:
        """`rest` follows `begun` as it is: with a space before it, mostly."""
        messages = [{"role": "user", "content": said}]
        text = render_chat(self._template, messages, self._tokenizer, "a row", generation_prompt=True)
        start = self._tokenizer.backend.id_to_token(self._tokenizer.bos)
        return {"prompt": text.removeprefix(start) + begun, "completion": rest}  # the start token comes by itself


def direct_row(chain: Chain, begun: BegunAnswers) -> Row:
    """The question, and the number alone, as the zero-shot template asks for it."""
    return begun.row(chain.question, NUMBER, f" {chain.answer}.")


def scratchpad_row(chain: Chain, begun: BegunAnswers) -> Row:
    """The question, and every step, as the zero-shot chain of thought asks for them in its first stage."""
    return begun.row(chain.question, REASONING_TRIGGER, f" {chain.scratchpad}")


def extraction_row(chain: Chain, begun: BegunAnswers) -> Row:
    """Its second stage: the number behind the steps."""
    written = f"{REASONING_TRIGGER} {chain.scratchpad} {EXTRACT}"
    return begun.row(chain.question, written, f" {chain.answer}.")


def sources_text(passages: Sequence[GivenSource], question: str) -> str:
    """What the retrieval-augmented template shows."""
    return f"{numbered_sources(passages)}\n\n{question}"


def _direct(draw: random.Random, begun: BegunAnswers) -> Row:
    chain = draw_chain(draw, draw.choice(CHAINS))
    if draw.random() < 0.5:
        return direct_row(chain, begun)
    return conversation([(chain.question, ANSWER.format(chain.answer))])


def _scratchpad(draw: random.Random, begun: BegunAnswers) -> Row:
    chain = draw_chain(draw, draw.choice(CHAINS))
    if draw.random() < 0.8:
        return scratchpad_row(chain, begun)
    return conversation([(f"{chain.question} {REASONING_TRIGGER}", chain.scratchpad)])


def _extraction(draw: random.Random, begun: BegunAnswers) -> Row:
    return extraction_row(draw_chain(draw, draw.choice(CHAINS)), begun)


def _grounded(draw: random.Random, _: BegunAnswers) -> Row:
    drawn = draw_conversation(draw, names()[0])
    turns = [(item.question, item.answer) for item in drawn]
    return conversation([(sources_text(drawn[0].passages, drawn[0].question), turns[0][1]), *turns[1:]])


def _labelled(draw: random.Random, _: BegunAnswers) -> Row:
    trained = labels.pools()[0]
    pool = trained[draw.choice(sorted(trained))]
    asked = draw.choice(pool)
    shown = [*labels.draw_shots(draw, pool, asked), asked]
    return conversation([(item.question, ANSWER.format(item.label)) for item in shown])


def _chat(draw: random.Random, _: BegunAnswers) -> Row:
    requests = chat.measured_and_trained()[1]
    said = []
    for _turn in range(draw.choice((1, 2, 2, 3))):
        kind = draw.random()
        said.append(
            chat.draw_story(draw)
            if kind < 0.08
            else draw.choice(chat.set_phrases())
            if kind < 0.5
            else draw.choice(requests)
        )
    turns = [(exchange.said, exchange.answer) for exchange in said]
    return conversation(turns, draw.choice(SYSTEM) if draw.random() < 0.25 else "")


# Rows of each kind, in the mixture that the model is trained on.
MIXTURE: dict[str, tuple[Callable[[random.Random, BegunAnswers], Row], int]] = {
    "direct": (_direct, 500),
    "scratchpad": (_scratchpad, 3700),
    "extraction": (_extraction, 200),
    "grounded": (_grounded, 2900),
    "labelled": (_labelled, 1300),
    "chat": (_chat, 1700),
}
