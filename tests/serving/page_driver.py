"""A browser with the chat page in it, for tests: what a user does and sees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scripted_server import ScriptedServer

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright (its package is enough)")
expect = playwright.expect

PATIENCE = 30_000  # milliseconds; what is waited for comes at once unless the machine has other work
expect.set_options(timeout=PATIENCE)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = "no browser: apt-get install chromium (or set CHROMIUM to its path)"


@contextmanager
def running_browser() -> Iterator[Any]:
    """A headless Chromium of this machine; skips where there is none. Nothing is downloaded."""
    paths = (os.environ.get("CHROMIUM"), *map(shutil.which, NAMES))
    path = next(filter(None, paths), None)
    if path is None:
        pytest.skip(MISSING)
    with playwright.sync_playwright() as started:
        # Chromium's sandbox does not run as root, which is what containers mostly are.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=path, args=[*sandbox, "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


class PageDriver:
    """One page of a fresh browser profile.

    Attributes:
        page: Playwright's.
        faults: what the browser complained of: errors of scripts, and what the page's policy forbade.

    Args:
        has_clock: the page's time goes on only as the test says (`page.clock`).
    """

    def __init__(self, browser: Any, server: ScriptedServer, *, has_clock: bool = False, **profile: Any) -> None:
        self.server = server
        self.context = browser.new_context(**{"viewport": {"width": 1000, "height": 700}, **profile})
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._on_console)
        if has_clock:
            self.page.clock.install()
        self.page.goto(server.address)

    def _on_console(self, message: Any) -> None:
        # A status that is no success is reported as an error too; those are what tests ask for.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.faults.append(message.text)

    def ask(self, text: str) -> None:
        """Type a message and press Enter."""
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def ask_and_wait(self, text: str) -> str:
        """The whole answer to a message, as it is shown."""
        before = self.page.locator(".answer").count()
        self.ask(text)
        expect(self.page.locator(".answer")).to_have_count(before + 1)
        self.wait()
        return self.answer()

    def wait(self) -> None:
        """Until no answer is being written."""
        expect(self.page.locator("#stop")).to_be_hidden()

    def answer(self, number: int = -1) -> str:
        """The text of an answer."""
        return self.page.locator(".answer .markdown").nth(number).inner_text()

    def question(self, number: int = -1) -> str:
        """The text of a question."""
        return self.page.locator(".said").nth(number).inner_text()

    def last(self, selector: str) -> Any:
        """An element of the last answer."""
        return self.page.locator(".turn").last.locator(selector)

    def close(self) -> None:
        """End; nothing must have gone wrong unseen."""
        self.context.close()
        assert self.faults == []
