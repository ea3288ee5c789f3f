"""The chat page with the real server behind it, its model a tiny random one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from page_driver import PageDriver, expect, running_browser

from quantlab.serving import texts
from quantlab.serving.settings import ServerSettings


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with running_browser() as started:
        yield started


class Holding:
    """Makes every answer hold after its first piece until it is released; a turn that nobody waits for ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released, self.cancelled = threading.Event(), threading.Event()
        self._write = texts._Writer.write
        monkeypatch.setattr(texts._Writer, "write", lambda writer, text: self.hold(writer, text))

    def hold(self, writer: Any, text: str) -> None:
        self._write(writer, text)
        while not self.released.wait(0.005):
            if writer._turn.cancelled is not None:
                self.cancelled.set()
            writer._turn.check()


def opened(browser: Any, running: Any) -> PageDriver:
    return PageDriver(browser, SimpleNamespace(address=f"{running.url}/"))


def kept_messages(chat: PageDriver) -> list[dict[str, Any]]:
    """As the page has stored them."""
    return chat.page.evaluate("kept.thisChat().messages")


def test_an_answer_is_the_servers(browser: Any, running: Any) -> None:
    """The text is that of the same request without the page; its figures stand below."""
    chat = opened(browser, running)
    chat.ask_and_wait("Once upon a time")
    _, answer = kept_messages(chat)
    told = running.client.chat("Once upon a time", seed=answer["seed"], max_tokens=None).json
    assert answer["content"] == told["choices"][0]["message"]["content"]
    expect(chat.last(".speed")).to_contain_text(f" {told['usage']['completion_tokens']} tokens · prompt ")
    assert chat.page.get_attribute("#temperature", "placeholder") == "0.8"
    expect(chat.page.locator("#model-name")).to_have_text("tiny")
    chat.close()


def test_stop_ends_the_computation(browser: Any, running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread finds that nobody waits, and what had come stays on the page."""
    holding = Holding(monkeypatch)
    chat = opened(browser, running)
    chat.ask("Once upon a time")
    expect(chat.last(".markdown")).not_to_be_empty()
    chat.page.click("#stop")
    assert holding.cancelled.wait(30)
    expect(chat.last(".remark")).to_have_text("Stopped.")
    assert kept_messages(chat)[1]["content"]
    chat.close()


def test_key_and_queue(
    browser: Any, start: Callable[..., Any], described: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second page asks for the key, is told that the server is busy, and is served when it no longer is."""
    holding = Holding(monkeypatch)
    with start(described(), ServerSettings(port=0, api_key="secret", queue=0)) as running:
        first, second = opened(browser, running), opened(browser, running)
        for chat in (first, second):
            chat.page.fill("#key", "secret")
            chat.page.click("#save-key")
            expect(chat.page.locator("#model-name")).to_have_text("tiny")
            chat.ask("Once upon a time")
            if chat is first:
                expect(chat.last(".markdown")).not_to_be_empty()
        expect(second.last(".passing p")).to_contain_text("The server is busy with other requests.")
        holding.released.set()
        first.wait()
        second.wait()
        for chat in (first, second):
            assert kept_messages(chat)[1]["content"]
            chat.close()
