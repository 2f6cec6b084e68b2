"""The built site in a real browser: `make docs-test`.

Headless Chromium opens every page twice, in light on a desktop and in dark on a phone; each of the first tests says
one thing that must hold there. Search, navigation and scheme are then tried once, and links are read from the files.
Pictures of all pages are left in site-screenshots/.
"""

import functools
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from playwright.sync_api import Page, Route, expect, sync_playwright

ROOT = Path(__file__).parents[1]
SITE = Path(os.environ.get("SITE", ROOT / "site"))
SCREENSHOTS = ROOT / "site-screenshots"
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

if not (SITE / "index.html").is_file():
    pytest.exit(f"There is no built site in {SITE}: run `make docs`.", returncode=1)
if CHROMIUM is None:
    advice = "run `apt-get install chromium` on Debian, or set CHROMIUM=/path"
    pytest.exit(
        f"There is no browser ({', '.join(BROWSERS)}): {advice}.", returncode=1
    )

PAGES = sorted(
    "/" + file.relative_to(SITE).as_posix().removesuffix("index.html")
    for file in SITE.rglob("index.html")
)
DEVICES = {
    "desktop": {
        "viewport": {"width": 1280, "height": 800},
        "color_scheme": "light",
    },
    "phone": {"viewport": {"width": 400, "height": 800}, "color_scheme": "dark"},
}
SCHEMES = {"desktop": "default", "phone": "slate"}


# On every page, on both devices -------------------------------------------------------------------


@dataclass
class Visit:
    """An opened page, and what went wrong on it so far."""

    page: Page
    device: str
    problems: list[str] = field(default_factory=list)

    def find(self, selector: str, wanted: str = "() => true") -> list[str]:
        """How the elements begin that match and for which a JavaScript function holds."""
        script = f"elements => elements.filter({wanted}).map(e => e.outerHTML.slice(0, 200))"
        return self.page.eval_on_selector_all(selector, script)

    def colours(self, selector: str, name: str = "color") -> set[str]:
        """The values that a CSS property has on the elements that match."""
        script = f"elements => elements.map(e => getComputedStyle(e)['{name}'])"
        return set(self.page.eval_on_selector_all(selector, script))


Opener = Callable[
    [str, str], AbstractContextManager[Visit]
]  # of a page's path and a device


def test_formulas_are_rendered(visit: Visit) -> None:
    assert not visit.find(
        ".arithmatex",
        "e => !e.querySelector('.katex') || e.querySelector('.katex-error')",
    )
    assert not visit.page.evaluate(RAW_FORMULAS)


def test_images_are_loaded_and_described(visit: Visit) -> None:
    assert not visit.find("img", "e => !e.alt.trim() || !e.naturalWidth")
    description = "(e.getAttribute('aria-label') ?? e.querySelector(':scope > title')?.textContent ?? '')"
    assert not visit.find(
        "figure.plot svg, svg[role=img]", f"e => !{description}.trim()"
    )


def test_nothing_is_wider_than_the_window(visit: Visit) -> None:
    width = DEVICES[visit.device]["viewport"]["width"]
    assert visit.page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert not visit.find(
        "article :not(svg *, .katex-mathml, .katex-mathml *)", STICKS_OUT
    )


def test_text_is_readable_in_the_scheme(visit: Visit) -> None:
    assert (
        visit.page.get_attribute("body", "data-md-color-scheme")
        == SCHEMES[visit.device]
    )
    (paper,) = visit.colours("body", "background-color")
    assert (
        luminance(rgba(paper)) < 0.1
        if visit.device == "phone"
        else luminance(rgba(paper)) > 0.9
    )
    for ink in visit.colours("article :is(p, li, td)"):
        assert contrast(ink, paper) >= 4.5


def test_plots_take_the_colour_of_the_text(visit: Visit) -> None:
    (ink,) = visit.colours("body")
    no_text_in_ink = f"e => ![...e.querySelectorAll('text')].some(t => getComputedStyle(t).fill === '{ink}')"
    assert not visit.find("figure.plot svg:has(text)", no_text_in_ink)
    # A label may be coloured, or white on a coloured mark; black is what nobody chose.
    assert "rgb(0, 0, 0)" not in visit.colours("figure.plot svg text", "fill")


def test_page_has_one_heading(visit: Visit) -> None:
    assert len(visit.find("h1")) == 1


def test_code_can_be_copied(visit: Visit) -> None:
    sources = ".highlight pre:has(> code):not(.result *, .doc-signature *)"
    assert not visit.find(
        sources, "e => !e.querySelector('button[data-md-type=copy]')"
    )


def test_nothing_went_wrong(visit: Visit) -> None:
    assert not visit.problems


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

# Ends right of the window, and in no box that scrolls.
STICKS_OUT = """e => {
    if (e.getBoundingClientRect().right <= innerWidth + 1) return false
    for (let box = e.parentElement; box.tagName !== "ARTICLE"; box = box.parentElement)
        if (/auto|scroll/.test(getComputedStyle(box).overflowX)) return false
    return true
}"""


def rgba(colour: str) -> tuple[float, float, float, float]:
    """Red, green, blue (0 to 255) and alpha (0 to 1) of a computed `rgb(...)` or `rgba(...)`."""
    red, green, blue, *alpha = map(float, re.findall(r"[\d.]+", colour))
    return red, green, blue, *(alpha or [1.0])


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance by WCAG 2, from 0 (black) to 1 (white)."""
    shares = [value / 255 for value in colour[:3]]
    linear = [
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in shares
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(ink: str, paper: str) -> float:
    """Contrast ratio by WCAG 2, from 1 to 21, of a colour that may let an opaque one shine through."""
    *front, alpha = rgba(ink)
    back = rgba(paper)[:3]
    blend = tuple(
        alpha * f + (1 - alpha) * b for f, b in zip(front, back, strict=True)
    )
    dark, light = sorted([luminance(blend), luminance(back)])
    return (light + 0.05) / (dark + 0.05)


# Once ---------------------------------------------------------------------------------------------


def test_search_finds_a_page(opened: Opener) -> None:
    with opened("/", "desktop") as visit:
        visit.page.locator("[data-md-component=search-query]").click()
        visit.page.keyboard.type("retention")
        result = visit.page.locator(".md-search-result__link").first
        address = result.get_attribute("href")
        result.click()
        visit.page.wait_for_url(address)
        expect(visit.page.locator(".md-content article")).to_contain_text(
            re.compile("retention", re.IGNORECASE)
        )
        assert not visit.problems


def test_instant_navigation_renders_formulas(opened: Opener) -> None:
    # A page with formulas that is not the first: from there one page back, and here again.
    path = next(
        path
        for path in PAGES
        if read(path).formulas and 'rel="prev"' in file_of(path).read_text()
    )
    with opened(path, "desktop") as visit:
        visit.page.route("**/sitemap.xml", local_sitemap)
        visit.page.reload()
        visit.page.evaluate("window.isTheSame = true")
        visit.page.locator(".md-footer__link--prev").click()
        visit.page.wait_for_url(lambda url: urlsplit(url).path != path)
        visit.page.locator(".md-footer__link--next").click()
        visit.page.wait_for_url(lambda url: urlsplit(url).path == path)
        expect(visit.page.locator(".arithmatex:has(.katex)")).to_have_count(
            read(path).formulas
        )
        test_formulas_are_rendered(visit)
        assert visit.page.evaluate("window.isTheSame"), (
            "the pages were loaded, not exchanged"
        )
        assert not visit.problems


def local_sitemap(route: Route) -> None:
    """Only pages that the sitemap names are exchanged, and it names them where they will be published."""
    sitemap = (SITE / "sitemap.xml").read_text()
    published = min(re.findall("<loc>(.*?)</loc>", sitemap), key=len)
    route.fulfill(
        body=sitemap.replace(published, urljoin(route.request.url, "/")),
        content_type="application/xml",
    )


def test_scheme_is_toggled(opened: Opener) -> None:
    with opened("/", "desktop") as visit:
        for scheme in ("slate", "default"):
            visit.page.locator("[data-md-component=palette] label:visible").click()
            expect(visit.page.locator("body")).to_have_attribute(
                "data-md-color-scheme", scheme
            )
        assert not visit.problems


# Links, without a browser -------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path: str) -> None:
    links = read(path).links
    assert not [
        link
        for link in links
        if is_internal(link) and not leads_somewhere(path, link)
    ]
    assert not [
        link for link in links if not is_internal(link) and not is_sound(link)
    ]


def is_internal(link: str) -> bool:
    return not (urlsplit(link).scheme or urlsplit(link).netloc)


def is_sound(link: str) -> bool:
    return (
        re.fullmatch(r"https://[\w-]+(\.[\w-]+)+([/?#][^\s<>\"\\]*)?", link)
        is not None
    )


def leads_somewhere(path: str, link: str) -> bool:
    """Whether the file that an internal link names is there, with the id after the `#`."""
    target = urlsplit(urljoin(path, link))
    path, fragment = unquote(target.path), unquote(target.fragment)
    return file_of(path).is_file() and (not fragment or fragment in read(path).ids)


def file_of(path: str) -> Path:
    file = SITE / path.removeprefix("/")
    return file / "index.html" if path.endswith("/") else file


class Document(HTMLParser):
    """What the checks need of a page's source."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.formulas = self.images = 0
        self.feed(source)

    def handle_starttag(
        self, tag: str, attrs: list[tuple[str, str | None]]
    ) -> None:
        values = {name: value or "" for name, value in attrs}
        classes = values.get("class", "").split()
        if "href" in values and values.get("rel") != "canonical":
            self.links.append(values["href"])
        if "id" in values:
            self.ids.add(values["id"])
        self.formulas += "arithmatex" in classes
        self.images += tag == "img" or (tag == "figure" and "plot" in classes)


@functools.cache
def read(path: str) -> Document:
    return Document(file_of(path).read_text())


# The browser --------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def summary() -> Iterator[None]:
    """Says at the end how much was looked at."""
    yield
    documents = [read(path) for path in PAGES]
    formulas = sum(document.formulas for document in documents)
    images = sum(document.images for document in documents)
    links = sum(
        is_internal(link) for document in documents for link in document.links
    )
    print(
        f"\n{len(PAGES)} pages, {formulas} formulas, {images} images and plots, {links} internal links"
    )


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def origin() -> Iterator[str]:
    """The address that serves the site."""
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=SITE)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def opened(origin: str) -> Iterator[Opener]:
    """Opens a page on a device, watches it, and scrolls to its end and back."""

    @contextmanager
    def open_page(path: str, device: str) -> Iterator[Visit]:
        with contexts[device].new_page() as page:
            visit = Visit(page, device)
            watch(visit, origin)
            page.goto(path)
            page.evaluate(SCROLL)
            yield visit

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        contexts = {
            name: browser.new_context(base_url=origin, **device)
            for name, device in DEVICES.items()
        }
        yield open_page
        browser.close()


# To the end, long enough for it to be drawn, and back.
SCROLL = """async () => {
    scrollTo(0, document.body.scrollHeight)
    await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))
    scrollTo(0, 0)
}"""


def watch(visit: Visit, origin: str) -> None:
    """Notes errors of scripts, failed requests, and requests that leave the site."""

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


# pytest runs the tests of one page on one device one after the other, so each is opened once.
@pytest.fixture(
    scope="module",
    params=[f"{device}:{path}" for path in PAGES for device in DEVICES],
)
def visit(request: pytest.FixtureRequest, opened: Opener) -> Iterator[Visit]:
    device, path = request.param.split(":")
    with opened(path, device) as visit:
        name = path.strip("/").replace("/", ".") or "index"
        visit.page.screenshot(
            path=SCREENSHOTS / f"{name}-{device}.png", full_page=True
        )
        yield visit
