"""The chat page when things go wrong: what it says, and what a user can do about it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from page_driver import PageDriver, expect, running_browser
from scripted_server import Reply, ScriptedServer, chunk, said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as started:
        yield started


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    started = ScriptedServer()
    yield started
    started.close()


@pytest.fixture
def chat(browser: Any, server: ScriptedServer) -> Iterator[PageDriver]:
    driver = PageDriver(browser, server)
    yield driver
    driver.close()


def test_a_full_queue_is_waited_for(browser: Any, server: ScriptedServer) -> None:
    """After 429 the seconds of Retry-After are counted down, then the same request is sent again."""
    chat = PageDriver(browser, server, has_clock=True)
    server.replies += [Reply(status=429, headers={"Retry-After": "3"}, error="the queue is full"), said("Here.")]
    chat.ask("Hello?")
    passing = chat.last(".passing p")
    expect(passing).to_have_text("The server is busy with other requests. Trying again in 3 s.")
    chat.page.clock.run_for(1100)
    expect(passing).to_have_text("The server is busy with other requests. Trying again in 2 s.")
    assert len(server.requests) == 1
    chat.page.clock.run_for(2100)
    expect(chat.last(".markdown")).to_have_text("Here.")
    assert server.requests[0] == server.requests[1]
    chat.close()


def test_the_wait_can_be_cut_short_or_given_up(chat: PageDriver) -> None:
    """Buttons beside the seconds, and Stop."""
    busy = Reply(status=503, headers={"Retry-After": "600"}, error="the model is being loaded")
    chat.server.replies += [busy, said("Here."), busy, busy]
    chat.ask("Hello?")
    expect(chat.last(".passing p")).to_have_text("The model is being loaded. Trying again in 600 s.")
    chat.page.click("text=Try now")
    expect(chat.last(".markdown")).to_have_text("Here.")
    chat.wait()
    for way in ("text=Cancel >> visible=true", "#stop"):
        chat.ask("Again?")
        expect(chat.last(".passing")).to_be_visible()
        chat.page.click(way)
        chat.wait()
        expect(chat.last(".remark")).to_have_text("Stopped before the first word.")
    assert len(chat.server.requests) == 4


def test_a_key_is_asked_for(browser: Any, server: ScriptedServer) -> None:
    """At the beginning, and again where the key is wrong; it is sent, and kept for this tab alone."""
    server.key = "right"
    chat = PageDriver(browser, server)
    expect(chat.page.locator("#key-dialog")).to_be_visible()
    chat.page.fill("#key", "wrong")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator("#key-reason")).to_have_text("The server does not know this key.")
    chat.page.click("#cancel-key")
    expect(chat.page.locator("#notice")).to_contain_text("The server does not know this key.")
    chat.ask("Hello?")
    expect(chat.page.locator("#key-dialog")).to_be_visible()
    server.replies.append(said("Here."))
    chat.page.fill("#key", "right")
    chat.page.click("#save-key")
    expect(chat.last(".markdown")).to_have_text("Here.")
    chat.page.reload()
    expect(chat.page.locator("#model-name")).to_have_text("tiny")
    assert server.authorizations == ["Bearer right"]
    assert "right" not in chat.page.evaluate("JSON.stringify(localStorage)")
    chat.close()


def test_a_refusal_is_told_in_the_servers_words(chat: PageDriver) -> None:
    """With a way to try again, which takes no second message."""
    chat.server.replies += [Reply(status=400, error="top_p must be above 0"), said("Here.")]
    chat.ask("Hello?")
    expect(chat.last(".failure p")).to_have_text("The server refused this request: top_p must be above 0")
    chat.last(".again").click()
    expect(chat.last(".markdown")).to_have_text("Here.")
    assert chat.server.requests[1]["messages"] == [{"role": "user", "content": "Hello?"}]


def test_a_conversation_beyond_the_context_can_lose_its_beginning(chat: PageDriver) -> None:
    """The oldest half of the questions is left out of requests, and stays on the page."""
    too_long = Reply(
        status=400, error="the prompt has 900 tokens; the context holds 512", code="context_length_exceeded"
    )
    chat.server.replies += [said("First."), said("Second."), too_long, said("Third.")]
    for text in ("one", "two"):
        chat.ask_and_wait(text)
    chat.ask("three")
    expect(chat.last(".failure p")).to_have_text("The prompt has 900 tokens; the context holds 512.")
    chat.last(".mend").click()
    expect(chat.last(".markdown")).to_have_text("Third.")
    assert [message["content"] for message in chat.server.requests[-1]["messages"]] == ["two", "Second.", "three"]
    assert chat.question(0) == "one"


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ("", "The connection was lost before the answer was complete."),
        ("data: {half\n\n", "The server sent something that this page cannot read."),
        ('data: {"error": {"message": "out of memory"}}\n\n', "The server gave up: out of memory"),
    ],
    ids=["cut", "malformed", "error"],
)
def test_an_answer_that_breaks_off_is_kept(chat: PageDriver, event: str, words: str) -> None:
    """What came stays, the page says what happened, and the rest can be had."""
    chat.server.replies += [Reply([chunk("So far"), event], is_whole=False), said(" so good.")]
    assert chat.ask_and_wait("Hello?") == "So far"
    expect(chat.last(".failure p")).to_have_text(words)
    chat.last(".go-on").click()
    expect(chat.last(".markdown")).to_have_text("So far so good.")
    expect(chat.last(".failure")).to_have_count(0)


def test_a_server_that_is_gone(chat: PageDriver) -> None:
    """Said with its address, at the question and when the page comes up."""
    address = chat.server.address.removeprefix("http://").rstrip("/")
    expect(chat.page.locator("#model-name")).to_have_text("tiny")
    chat.server.close()
    chat.ask("Hello?")
    expect(chat.last(".failure p")).to_have_text(f"The server at {address} does not answer. Is it still running?")
    expect(chat.last(".again")).to_be_visible()


def test_what_storage_holds_is_not_trusted(chat: PageDriver) -> None:
    """Entries that are no chats or settings of this page are as if they were not there."""
    chat.page.evaluate(
        """() => {
            localStorage.clear(); sessionStorage.clear();
            localStorage.setItem("quantlab.settings", '{"temperature": "hot", "maxTokens": 5, "system": 7}');
            localStorage.setItem("quantlab.chat.a", "{half");
            localStorage.setItem("quantlab.chat.b", '{"messages": [7, {"role": "user", "content": "Hi"}]}');
            const odd = {role: "assistant", content: "Ho", sources: {length: 2}, failure: 3, speed: {}, reasoning: [1]};
            const chat = {messages: [{role: "user", content: "Hey"}, odd], updated: 5};
            localStorage.setItem("quantlab.chat.c", JSON.stringify(chat));
        }"""
    )
    chat.page.reload()
    expect(chat.page.locator(".said")).to_have_text(["Hey"])
    chat.page.click("#open-chats")
    expect(chat.page.locator("#chat-list .title")).to_have_text(["Hey", "Hi"])
    chat.page.locator("#chat-list .choose").nth(1).click()
    chat.server.replies.append(said("Yes."))
    chat.ask_and_wait("Well?")
    (request,) = chat.server.requests
    assert request["max_tokens"] == 5
    assert "temperature" not in request
    assert [message["role"] for message in request["messages"]] == ["user"]


def test_a_chat_that_is_deleted_stays_deleted(chat: PageDriver) -> None:
    """Also while its answer is being written: that is stopped, and not saved afterwards."""
    chat.server.replies.append(Reply([chunk("Half")], hold=threading.Event()))
    chat.ask("old")
    expect(chat.last(".markdown")).to_have_text("Half")
    chat.page.click("#open-chats")
    chat.page.dblclick("#chat-list .remove")
    assert chat.server.gone.wait(30)
    expect(chat.page.locator("#welcome")).to_be_attached()
    chat.page.wait_for_function("kept.chats().length === 0")
    chat.page.reload()
    expect(chat.page.locator(".turn")).to_have_count(0)


def test_tabs_of_one_chat_agree(chat: PageDriver) -> None:
    """What one tab adds appears in the other."""
    chat.server.replies += [said("One."), said("Two.")]
    chat.ask_and_wait("1")
    other = chat.context.new_page()
    other.goto(chat.server.address)
    expect(other.locator(".said")).to_have_text(["1"])
    chat.ask_and_wait("2")
    expect(other.locator(".said")).to_have_text(["1", "2"])
    expect(other.locator(".markdown")).to_have_text(["One.", "Two."])


def test_a_full_storage_is_told(chat: PageDriver) -> None:
    """The chat goes on, and the page says that it will not be kept."""
    chat.page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException(); }; }")
    chat.server.replies += [said("One."), said("Two.")]
    chat.ask_and_wait("1")
    expect(chat.page.locator("#notice")).to_contain_text("this chat will be lost with the page")
    chat.ask_and_wait("2")
    assert len(chat.server.requests[-1]["messages"]) == 3


def test_a_new_chat_ends_the_answer_of_the_old_one(chat: PageDriver) -> None:
    """What came of it is kept with its chat, and nothing of it appears in the new one."""
    chat.server.replies.append(Reply([chunk("Half")], hold=threading.Event()))
    chat.ask("old")
    expect(chat.last(".markdown")).to_have_text("Half")
    chat.page.click("#new-chat")
    assert chat.server.gone.wait(30)
    expect(chat.page.locator(".turn")).to_have_count(0)
    chat.page.click("#open-chats")
    chat.page.locator("#chat-list .choose").click()
    assert chat.answer() == "Half"
    expect(chat.last(".remark")).to_have_text("Stopped.")
