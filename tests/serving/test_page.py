"""The chat page in a browser: what a user does, and what comes of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_driver import PageDriver, expect, running_browser
from scripted_server import Reply, ScriptedServer, chunk, said, thought

from quantlab.generation.conversation_file import SavedConversation, read_conversation, write_conversation
from quantlab.generation.sampling import SamplingParams


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


def contents(request: dict[str, Any]) -> list[tuple[str, str]]:
    """Roles and texts of a request."""
    return [(message["role"], message["content"]) for message in request["messages"]]


def test_an_answer_is_shown_while_it_is_written(chat: PageDriver) -> None:
    """Words stand there before the answer is whole; then its speed, and the field is ready for the next message."""
    release = threading.Event()
    timings = {"predicted_per_second": 23.71, "predicted_n": 4, "cache_n": 5, "prompt_n": 6}
    chat.server.replies.append(Reply([chunk("Once upon"), chunk(" a time")], hold=release))
    chat.ask("A story, please")
    expect(chat.last(".markdown")).to_have_text("Once upon a time")
    expect(chat.page.locator("#stop")).to_be_visible()
    expect(chat.page.locator("#send")).to_be_hidden()
    chat.server.replies.append(said("The", " end.", timings=timings, usage={"prompt_tokens": 11}))
    chat.page.click("#stop")
    assert chat.ask_and_wait("Go on") == "The end."
    expect(chat.last(".speed")).to_contain_text("24 tokens/s · 4 tokens · prompt 11 (5 cached) · seed ")
    assert chat.page.title() == "A story, please - quantlab"
    release.set()


def test_a_request_has_the_conversation_and_asks_for_a_stream(chat: PageDriver) -> None:
    """Turns in order, no fields that the user left to the server, and a seed that differs from request to request."""
    chat.server.replies += [said("Four."), said("Nine.")]
    chat.ask_and_wait("2 + 2?")
    chat.ask_and_wait("3 * 3?")
    first, second = chat.server.requests
    assert contents(second) == [("user", "2 + 2?"), ("assistant", "Four."), ("user", "3 * 3?")]
    assert first["stream"] is True
    assert first.keys() == {"messages", "stream", "stream_options", "seed"}
    assert first["seed"] != second["seed"]


def test_stop_ends_the_request_and_keeps_what_came(chat: PageDriver) -> None:
    """The server sees the client go; the text stays, is part of the next request, and can be continued."""
    chat.server.replies.append(Reply([chunk("One, two")], hold=threading.Event()))
    chat.ask("Count")
    expect(chat.last(".markdown")).to_have_text("One, two")
    chat.page.click("#stop")
    assert chat.server.gone.wait(30)
    expect(chat.last(".remark")).to_have_text("Stopped.")
    expect(chat.page.locator("#question")).to_be_focused()
    chat.server.replies.append(said(", three."))
    chat.page.click(".go-on")
    expect(chat.last(".markdown")).to_have_text("One, two, three.")
    first, second = chat.server.requests
    assert contents(second) == [("user", "Count"), ("assistant", "One, two")]
    assert second["seed"] == first["seed"]


def test_stopped_before_the_first_word(chat: PageDriver) -> None:
    """The question stays; with the next one it makes one message, for templates want turns."""
    chat.server.replies.append(Reply(hold=threading.Event()))
    chat.ask("First")
    expect(chat.last(".waiting")).to_be_visible()
    chat.page.keyboard.press("Escape")
    assert chat.server.gone.wait(30)
    expect(chat.last(".remark")).to_have_text("Stopped before the first word.")
    chat.server.replies.append(said("Yes."))
    chat.ask_and_wait("Second")
    assert contents(chat.server.requests[-1]) == [("user", "First\n\nSecond")]


def test_retry_asks_again_with_the_next_seed(chat: PageDriver) -> None:
    """The answer is replaced; of a fixed seed the number of retries is added, as in `quantlab chat`."""
    set_fields(chat, seed="7")
    chat.server.replies += [said("One."), said("Two."), said("Three.")]
    chat.ask_and_wait("Say something")
    for expected in ("Two.", "Three."):
        chat.last(".retry").first.click()
        expect(chat.last(".markdown")).to_have_text(expected)
        chat.wait()
    assert chat.page.locator(".answer").count() == 1
    assert [request["seed"] for request in chat.server.requests] == [7, 8, 9]


def test_an_edited_message_replaces_what_follows(chat: PageDriver) -> None:
    """Enter in its field sends it; Escape leaves it as it was."""
    chat.server.replies += [said("A."), said("B."), said("C.")]
    chat.ask_and_wait("first")
    chat.ask_and_wait("second")
    chat.page.locator(".edit").first.click()
    chat.page.keyboard.press("Escape")
    assert chat.question(0) == "first"
    chat.page.locator(".edit").first.click()
    chat.page.fill(".edit-form textarea", "other")
    chat.page.keyboard.press("Enter")
    expect(chat.page.locator(".turn")).to_have_count(2)
    chat.wait()
    assert (chat.question(), chat.answer()) == ("other", "C.")
    assert contents(chat.server.requests[-1]) == [("user", "other")]


def test_enter_sends_but_not_while_a_character_is_composed(chat: PageDriver) -> None:
    """Shift+Enter begins a line, Enter may end a composition of an input method, and blanks are no message."""
    chat.page.fill("#question", "   ")
    chat.page.press("#question", "Enter")
    expect(chat.page.locator("#send")).to_be_disabled()
    chat.page.fill("#question", "one")
    chat.page.press("#question", "Shift+Enter")
    chat.page.keyboard.type("two")
    composing = "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}"
    chat.page.evaluate(f"document.querySelector('#question').dispatchEvent(new KeyboardEvent('keydown', {composing}))")
    assert chat.page.input_value("#question") == "one\ntwo"
    chat.server.replies.append(said("Yes."))
    chat.page.press("#question", "Enter")
    expect(chat.last(".markdown")).to_have_text("Yes.")
    assert chat.question() == "one\ntwo"
    assert len(chat.server.requests) == 1


def test_a_reload_keeps_the_conversation(chat: PageDriver) -> None:
    """Also an answer that was being written, as far as it had come."""
    chat.server.replies += [said("**Yes.**"), Reply([chunk("It was")], hold=threading.Event())]
    chat.ask_and_wait("Is it?")
    chat.ask("Why?")
    expect(chat.last(".markdown")).to_have_text("It was")
    chat.page.reload()
    expect(chat.page.locator(".turn")).to_have_count(4)
    assert [chat.question(0), chat.answer(0), chat.answer(1)] == ["Is it?", "Yes.", "It was"]
    assert chat.page.locator(".markdown strong").inner_text() == "Yes."
    expect(chat.last(".remark")).to_have_text("The page was closed before the answer was complete.")
    assert chat.server.gone.wait(30)


def test_chats_are_kept_beside_each_other(chat: PageDriver) -> None:
    """A new one is empty; the old one is listed, comes back, and can be deleted."""
    chat.server.replies += [said("Red."), said("Blue.")]
    chat.ask_and_wait("first chat")
    chat.page.click("#new-chat")
    expect(chat.page.locator("#welcome")).to_be_visible()
    chat.ask_and_wait("second chat")
    assert contents(chat.server.requests[-1]) == [("user", "second chat")]
    chat.page.click("#open-chats")
    expect(chat.page.locator("#chat-list .title")).to_have_text(["second chat", "first chat"])
    chat.page.locator("#chat-list .choose").nth(1).click()
    expect(chat.page.locator(".said")).to_have_text(["first chat"])
    chat.page.click("#open-chats")
    remove = chat.page.locator("#chat-list .remove").nth(1)
    remove.click()
    remove.click()  # the first press only asks
    expect(chat.page.locator("#chat-list li")).to_have_count(1)
    chat.page.click("#close-chats")
    expect(chat.page.locator("#welcome")).to_be_visible()


def set_fields(chat: PageDriver, **values: str) -> None:
    """Fill fields of the settings by their ids, with _ for -, and save."""
    chat.page.click("#open-settings")
    for name, value in values.items():
        chat.page.fill(f"#{name.replace('_', '-')}", value)
    chat.page.click("#save-settings")
    expect(chat.page.locator("#settings")).to_be_hidden()


def test_settings_are_kept_and_sent(chat: PageDriver) -> None:
    """The system prompt leads the messages; a field out of range is not saved; Cancel changes nothing."""
    set_fields(chat, system="Be brief.", temperature="0.5", max_tokens="20", seed="3", top_k="10")
    chat.page.reload()
    chat.page.click("#open-settings")
    chat.page.fill("#temperature", "-1")
    chat.page.click("#save-settings")
    expect(chat.page.locator("#settings")).to_be_visible()
    chat.page.click("#cancel-settings")
    chat.server.replies.append(said("Yes."))
    chat.ask_and_wait("Well?")
    (request,) = chat.server.requests
    assert contents(request) == [("system", "Be brief."), ("user", "Well?")]
    sent = {name: request[name] for name in ("temperature", "max_tokens", "seed", "top_k")}
    assert sent == {"temperature": 0.5, "max_tokens": 20, "seed": 3, "top_k": 10}


def test_export_is_what_quantlab_chat_loads(chat: PageDriver, tmp_path: Path) -> None:
    """`read_conversation` takes the file, and has from it what the page had."""
    set_fields(chat, system="Be brief.", temperature="0.5", seed="3", max_tokens="20")
    chat.server.replies.append(said("Grün & <b>."))
    chat.ask_and_wait("Which colour?")
    chat.page.click("#open-chats")
    with chat.page.expect_download() as download:
        chat.page.click("#export")
    download.value.save_as(tmp_path / "conversation.json")
    found = read_conversation(tmp_path / "conversation.json")
    messages = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Grün & <b>."}]
    params = SamplingParams(temperature=0.5, seed=3)
    assert found == SavedConversation("Be brief.", messages, "tiny", params, 20)


def test_import_takes_what_quantlab_chat_saves(chat: PageDriver, tmp_path: Path) -> None:
    """Messages, system prompt and parameters; a file that is none is refused in words, and nothing changes."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "*Hi*"}]
    params = SamplingParams(temperature=0.25, logit_bias={5: -float("inf")})
    write_conversation(tmp_path / "saved.json", SavedConversation("Be kind.", messages, "tiny", params, 64))
    (tmp_path / "other.json").write_text(json.dumps({"messages": [{"role": "tool", "content": "x"}]}))
    chat.page.set_input_files("#import-file", tmp_path / "other.json")
    expect(chat.page.locator("#notice")).to_contain_text("other.json: Message 1: the role must be")
    chat.page.set_input_files("#import-file", tmp_path / "saved.json")
    expect(chat.page.locator(".markdown em")).to_have_text("Hi")
    chat.server.replies.append(said("Bye."))
    chat.ask_and_wait("Bye")
    (request,) = chat.server.requests
    assert contents(request)[:2] == [("system", "Be kind."), ("user", "Hello")]
    assert (request["temperature"], request["max_tokens"]) == (0.25, 64)


def test_reasoning_is_folded_away(chat: PageDriver) -> None:
    """It is readable at a click, and no part of the conversation that is sent."""
    chat.server.replies += [
        Reply([thought("Let me"), thought(" think."), chunk("Four."), chunk(finish="stop")]),
        said("Five."),
    ]
    assert chat.ask_and_wait("2 + 2?") == "Four."
    expect(chat.last(".reasoning-text")).to_be_hidden()
    chat.last(".reasoning summary").click()
    expect(chat.last(".reasoning-text")).to_have_text("Let me think.")
    chat.ask_and_wait("2 + 3?")
    assert contents(chat.server.requests[-1])[1] == ("assistant", "Four.")


def test_sources_are_asked_for_and_shown(browser: Any, server: ScriptedServer) -> None:
    """Where the server says that it has an index there is a choice; passages are named below the answer."""
    server.model_details = {"engine": "native", "has_index": True}
    chat = PageDriver(browser, server)
    found = [{"number": 1, "source": "notes.md, line 3", "text": "Paris <b>", "score": 0.5}]
    server.replies += [Reply([chunk("", sources=found), chunk("Paris [1]."), chunk(finish="stop")]), said("Rome.")]
    chat.ask_and_wait("Capital of France?")
    chat.last(".sources summary").click()
    expect(chat.last(".sources li")).to_have_text("notes.md, line 3Paris <b>")
    chat.page.uncheck("#use-sources")
    chat.ask_and_wait("And of Italy?")
    assert [request.get("retrieval") for request in server.requests] == [True, None]
    chat.close()


def test_a_model_can_be_chosen_where_there_are_several(browser: Any, server: ScriptedServer) -> None:
    """Adapters are models by name; the choice is kept."""
    server.models = ["tiny", "tiny-poet"]
    chat = PageDriver(browser, server)
    chat.page.select_option("#model", "tiny-poet")
    chat.page.reload()
    server.replies.append(said("Yes."))
    chat.ask_and_wait("Well?")
    assert server.requests[0]["model"] == "tiny-poet"
    assert chat.page.input_value("#model") == "tiny-poet"
    chat.close()


def test_the_page_follows_an_answer_only_where_the_reader_does(chat: PageDriver) -> None:
    """At the end of the conversation new text comes into view; scrolled up, what is read stays where it is."""
    release = threading.Event()
    lines = "\n\n".join(f"Line {number}" for number in range(60))
    chat.server.replies += [said(lines), Reply([chunk(lines)], hold=release)]
    place = "(({scrollTop, scrollHeight, clientHeight}) => scrollHeight - scrollTop - clientHeight)"
    left = f"{place}(document.querySelector('#conversation'))"
    chat.ask_and_wait("Many lines")
    assert chat.page.evaluate(left) < 2
    chat.ask("Again")
    expect(chat.last(".markdown p")).to_have_count(60)
    chat.page.wait_for_function(f"{left} < 2")
    chat.page.evaluate("document.querySelector('#conversation').scrollTop = 100")
    expect(chat.page.locator("#to-end")).to_be_visible()
    release.set()
    chat.wait()
    assert chat.page.evaluate("document.querySelector('#conversation').scrollTop") == 100
    chat.page.click("#to-end")
    assert chat.page.evaluate(left) < 2


def test_a_phone_sees_all_of_it(browser: Any, server: ScriptedServer) -> None:
    """At 320 pixels nothing is wider than the page, long words and code included; Enter begins a line there."""
    chat = PageDriver(browser, server, viewport={"width": 320, "height": 600}, has_touch=True, is_mobile=True)
    wide = "w" * 300
    server.replies.append(said(f"{wide}\n\n```\n{wide}\n```\n\n| a | b |\n|---|---|\n| {wide} | {wide} |"))
    chat.page.fill("#question", wide)
    chat.page.press("#question", "Enter")
    assert chat.page.input_value("#question") == f"{wide}\n"
    chat.page.tap("#send")
    expect(chat.page.locator(".speed, .copy").last).to_be_visible()
    chat.wait()
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 320
    frame = chat.page.locator("#conversation")
    assert frame.evaluate("frame => frame.scrollWidth - frame.clientWidth") == 0
    chat.close()


def test_the_keyboard_reaches_everything(chat: PageDriver) -> None:
    """In the order of the page, from the link that skips to the field; a dialog keeps the focus and gives it back."""
    set_fields(chat, system="Be brief.")
    chat.server.replies.append(said("```\ncode\n```\n\n[a](https://x.org)"))
    chat.ask_and_wait("Hello")
    chat.page.focus(".skip")
    focused = "(({id, className, localName}) => id || className || localName)(document.activeElement)"
    order = []
    for _ in range(13):
        chat.page.keyboard.press("Tab")
        order.append(chat.page.evaluate(focused))
    assert order == [
        *("open-chats", "new-chat", "open-settings", "conversation", "system-shown"),
        *("quiet edit", "quiet copy", "quiet copy-code", "pre", "a", "quiet copy", "quiet retry", "question"),
    ]
    chat.page.focus("#open-settings")
    chat.page.keyboard.press("Enter")
    for _ in range(12):
        chat.page.keyboard.press("Tab")
        assert chat.page.evaluate(
            "document.querySelector('#settings').matches(':focus-within') || !document.hasFocus()"
        )
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#open-settings")).to_be_focused()


def test_a_screen_reader_hears_paragraphs(chat: PageDriver) -> None:
    """Each once, when it is whole."""
    release = threading.Event()
    pieces = ["First ", "one.\n\nSec", "ond one.\n\nTh", "ird"]
    chat.server.replies.append(Reply([chunk(piece) for piece in pieces], hold=release))
    chat.ask("Hello")
    spoken = chat.page.locator("#spoken p")
    expect(spoken).to_have_text(["First one."])
    release.set()
    chat.wait()
    assert spoken.all_inner_texts() == ["First one.", "Second one.", "Third"]
