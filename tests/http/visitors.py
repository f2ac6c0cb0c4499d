"""Somebody who looks at the page: a context of the browser, and what it complains about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Locator, Page, expect

# What the browser says of every answer that is an error, and of a server that is away.
_REFUSED = re.compile(r"^Failed to load resource")
# Notes what a person sees only for a moment, each once.
_WITNESS = """
window.seen = { status: [], preview: [] };
new MutationObserver(() => {
  const texts = [...document.querySelectorAll(".status")].map((line) => ["status", line.textContent]);
  const images = [...document.querySelectorAll("img.preview")].map((image) => ["preview", image.src]);
  for (const [kind, value] of [...texts, ...images]) {
    if (!window.seen[kind].includes(value)) window.seen[kind].push(value);
  }
}).observe(document, { subtree: true, childList: true, attributes: true });
"""


@dataclass
class Visitor:
    """One tab, in which nothing may go wrong.

    Attributes:
        page: the tab.
        complaints: what stood in its console; calls that were refused do not count.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)

    def describe(self, prompt: str, **settings: object) -> None:
        """Fill in the form, once it has its defaults: `settings` are its fields by name."""
        expect(self.page.locator("#draw")).to_be_enabled()
        self.page.locator("[name=prompt]").fill(prompt)
        for name, value in settings.items():
            self.page.locator(f"[name={name}]").fill(str(value))

    def draw(self, prompt: str, **settings: object) -> Locator:
        """Ask for images; the card of the job."""
        self.describe(prompt, **settings)
        self.page.locator("#draw").click()
        return self.card(prompt)

    def seen(self, kind: Literal["status", "preview"]) -> list[str]:
        """The lines that said how jobs are, or the addresses of previews, since the page was loaded."""
        return list(self.page.evaluate("kind => window.seen[kind]", kind))

    def card(self, prompt: str) -> Locator:
        """The newest job with this prompt."""
        return self.page.locator("#gallery > li", has_text=prompt).first

    def button(self, card: Locator, name: str) -> Locator:
        """A button of a card, by what it says."""
        return card.get_by_role("button", name=name, exact=True)


def new_context(browser: Browser, **options: Any) -> BrowserContext:
    """A profile of the browser: English, and without motion, unless the options say otherwise."""
    return browser.new_context(**{"locale": "en-GB", "reduced_motion": "reduce", **options})


@contextmanager
def visiting(context: BrowserContext, url: str, token: str | None = None) -> Iterator[Visitor]:
    """A visitor who has opened the page in a new tab, and at whose end nothing was wrong.

    Args:
        context: of the browser.
        url: of the bridge.
        token: was given before in this tab.
    """
    page = context.new_page()
    try:
        visitor = Visitor(page)

        def note(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not _REFUSED.match(message.text):
                visitor.complaints.append(message.text)

        page.on("console", note)
        page.on("pageerror", lambda error: visitor.complaints.append(str(error)))
        page.add_init_script(_WITNESS)
        page.goto(url)
        if token is not None:
            page.locator("#token input").fill(token)
            page.locator("#token button").click()
        yield visitor
        assert visitor.complaints == []
    finally:
        page.close()
