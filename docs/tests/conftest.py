"""The built site in a real browser: `make docs-test`.

Headless Chromium opens every page twice, in light on a desktop and in dark on a phone, for test_every_page.py.
test_navigation.py tries search, navigation and scheme once; test_links.py reads links from the files. Pictures of all
pages are left in site-screenshots/.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from browser import BROWSERS, CHROMIUM, DEVICES, FLAGS, SCROLL, Opener, Visit, watch
from built_site import PAGES, ROOT, SITE, is_internal, read
from playwright.sync_api import sync_playwright

SCREENSHOTS = ROOT / "site-screenshots"


def pytest_sessionstart() -> None:
    """Stop where the site or a browser is missing."""
    if not (SITE / "index.html").is_file():
        pytest.exit(
            f"There is no built site in {SITE}: run `make docs`.", returncode=1
        )
    if CHROMIUM is None:
        advice = "run `apt-get install chromium` on Debian, or set CHROMIUM=/path"
        pytest.exit(
            f"There is no browser ({', '.join(BROWSERS)}): {advice}.", returncode=1
        )


@pytest.fixture(scope="session", autouse=True)
def summary() -> Iterator[None]:
    """Say at the end how much was looked at."""
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
    """Serve the site, and give its address."""
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(QuietHandler, directory=SITE)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def opened(origin: str) -> Iterator[Opener]:
    """Give a function that opens a page on a device, watches it, and scrolls to its end and back."""

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
