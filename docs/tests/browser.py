"""Opens pages in headless Chromium, and notes what goes wrong on them."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from playwright.sync_api import Page

BROWSERS = (
    [os.environ["CHROMIUM"]]
    if "CHROMIUM" in os.environ
    else ["chromium", "chromium-browser", "google-chrome"]
)
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--no-sandbox",
]

DEVICES = {
    "desktop": {
        "viewport": {"width": 1280, "height": 800},
        "color_scheme": "light",
    },
    "phone": {"viewport": {"width": 400, "height": 800}, "color_scheme": "dark"},
}
SCHEMES = {"desktop": "default", "phone": "slate"}


@dataclass
class Visit:
    """An opened page, and what went wrong on it so far."""

    page: Page
    device: str
    problems: list[str] = field(default_factory=list)

    def find(self, selector: str, wanted: str = "() => true") -> list[str]:
        """List how the elements begin that match and for which a JavaScript function holds."""
        script = f"elements => elements.filter({wanted}).map(e => e.outerHTML.slice(0, 200))"
        return self.page.eval_on_selector_all(selector, script)

    def raw_formulas(self) -> list[str]:
        """List formulas that KaTeX did not set: those in which it failed, and text in the delimiters of TeX."""
        unset = "e => !e.querySelector('.katex') || e.querySelector('.katex-error')"
        return self.find(".arithmatex", unset) + self.page.evaluate(RAW_FORMULAS)

    def colours(self, selector: str, name: str = "color") -> set[str]:
        """Return the values that a CSS property has on the elements that match."""
        script = f"elements => elements.map(e => getComputedStyle(e)['{name}'])"
        return set(self.page.eval_on_selector_all(selector, script))


# Opens the page of a path on a device.
Opener = Callable[[str, str], AbstractContextManager[Visit]]

# To the end, long enough for it to be drawn, and back.
SCROLL = """async () => {
    scrollTo(0, document.body.scrollHeight)
    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))
    scrollTo(0, 0)
}"""

# Text outside code that still shows TeX's delimiters. KaTeX keeps the source for screen readers.
RAW_FORMULAS = r"""() => {
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), raw = []
    while (texts.nextNode()) {
        const node = texts.currentNode
        if (/\\\(|\\\[|\$\$/.test(node.data) && !node.parentElement.closest("code, pre, script, style, .katex"))
            raw.push(node.data.trim().slice(0, 200))
    }
    return raw
}"""


def watch(visit: Visit, origin: str) -> None:
    """Note errors of scripts, failed requests, and requests that leave the site."""

    def note(kind: str, what: object) -> None:
        visit.problems.append(f"{kind}: {what}")

    page = visit.page
    page.on(
        "console",
        lambda message: message.type == "error" and note("console", message.text),
    )
    page.on("pageerror", lambda error: note("script", error))
    page.on(
        "request",
        lambda request: (
            request.url.startswith(origin) or note("elsewhere", request.url)
        ),
    )
    page.on("requestfailed", lambda request: note("failed", request.url))
    page.on(
        "response",
        lambda response: (
            response.status >= 400 and note(str(response.status), response.url)
        ),
    )
