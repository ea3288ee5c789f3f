"""Reasoning is told apart from the answer, wherever pieces of the text end."""

from __future__ import annotations

import pytest

from quantlab.serving.reasoning import ReasoningSplit, split_reasoning

CASES = {
    "<think>\nWhy? Because.\n</think>\n\nYes.": ("Why? Because.", "Yes."),
    "\n<think>a</think>b": ("a", "b"),
    "<think>never ends ": ("never ends", ""),
    "<think></think>b": (None, "b"),
    "<thin ice": (None, "<thin ice"),
    "  plain </think>": (None, "  plain </think>"),
    "a <think>b</think>": (None, "a <think>b</think>"),
    "<think>a < b </thin </think> c </think>": ("a < b </thin", "c </think>"),
    "<think>a \n\n b</think>\nc\n": ("a \n\n b", "c\n"),
    "<th": (None, "<th"),
    "": (None, ""),
}


def streamed(text: str, size: int, *, is_inside: bool) -> tuple[str, str]:
    split, parts = ReasoningSplit(is_inside=is_inside), []
    for start in range(0, len(text), size):
        parts.append(split.add(text[start : start + size]))
    parts.append(split.rest())
    return "".join(reasoning for reasoning, _ in parts), "".join(answer for _, answer in parts)


@pytest.mark.parametrize("text", CASES)
def test_texts_are_parted_at_the_marks(text: str) -> None:
    """As a whole, and in pieces of any size."""
    reasoning, answer = CASES[text]
    assert split_reasoning(text, is_inside=False) == (reasoning, answer)
    for size in (1, 2, 3, 7):
        assert streamed(text, size, is_inside=False) == (reasoning or "", answer)


def test_a_prompt_may_have_opened_the_reasoning() -> None:
    """As templates that force it do."""
    assert split_reasoning("so </think>\nyes", is_inside=True) == ("so", "yes")
    for size in (1, 4):
        assert streamed("so </think>\nyes", size, is_inside=True) == ("so", "yes")


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(start, described):
    with start(described(chat_template=TEMPLATE)) as running:
        yield running


@pytest.fixture(scope="module")
def forced_thinker(start, described):
    with start(described(chat_template=TEMPLATE.replace("[assistant]", "[assistant]<think>\n"))) as running:
        yield running


def written(text: str) -> dict:
    """What lets a model write nothing else."""
    return {"grammar": f'root ::= "{text}"', "max_tokens": 60}


def test_messages_and_deltas_have_reasoning_content(thinker, forced_thinker) -> None:
    """Where the template knows the marks; `reasoning_format: none` leaves them in the text."""
    think = written("<think>hm, so</think>yes")
    message = thinker.client.chat(**think).json["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "yes", "reasoning_content": "hm, so"}
    deltas = [
        choice["delta"] for event in thinker.client.chat(**think, stream=True).events for choice in event["choices"]
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm, so"
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"
    message = thinker.client.chat(**think, reasoning_format="none").json["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<think>hm, so</think>yes"}


def test_a_form_holds_for_the_answer_behind_reasoning(forced_thinker) -> None:
    """Where the prompt opens it: the model reasons freely, up to the limit, and then the form binds it."""
    asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}}
    asked |= {"max_tokens": 12, "seed": 2, "logit_bias": {"2": -1000}}
    free = forced_thinker.client.chat(max_tokens=12, seed=2, logit_bias={"2": -1000}).json["choices"][0]["message"]
    whole = forced_thinker.client.chat(**asked).json
    message = whole["choices"][0]["message"]
    assert message["content"] in ('"yes"', '"no"')
    assert message["reasoning_content"] == free["reasoning_content"]
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] > 12
    events = forced_thinker.client.chat(**asked, stream=True).events
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    raw = forced_thinker.client.chat(**asked, reasoning_format="none").json["choices"][0]["message"]["content"]
    assert raw.endswith(f"</think>\n\n{message['content']}")
    two = forced_thinker.client.chat(**asked, n=2).json["choices"]
    assert two[0]["message"] == message
    assert {choice["message"]["content"] for choice in two} <= {'"yes"', '"no"'}
    assert forced_thinker.client.chat(**asked, logprobs=True).error["param"] == "logprobs"


def test_a_model_without_marks_writes_what_it_likes(running) -> None:
    """Its text is its text."""
    message = running.client.chat(**written("<think>a</think>b")).json["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<think>a</think>b"}
