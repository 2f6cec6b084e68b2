"""Reads the files of the built site."""

import functools
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("SITE", ROOT / "site"))
PAGES = sorted(
    "/" + file.relative_to(SITE).as_posix().removesuffix("index.html")
    for file in SITE.rglob("index.html")
)


class Document(HTMLParser):
    """Collects what the checks need of a page's source."""

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
    """Parse a page, once."""
    return Document(file_of(path).read_text())


def file_of(path: str) -> Path:
    """Return the file that a web server would send for a path."""
    file = SITE / path.removeprefix("/")
    return file / "index.html" if path.endswith("/") else file


def is_internal(link: str) -> bool:
    return not (urlsplit(link).scheme or urlsplit(link).netloc)


def is_sound(link: str) -> bool:
    return (
        re.fullmatch(r"https://[\w-]+(\.[\w-]+)+([/?#][^\s<>\"\\]*)?", link)
        is not None
    )


def leads_somewhere(path: str, link: str) -> bool:
    """Say whether the file that an internal link names is there, with the id after the `#`."""
    target = urlsplit(urljoin(path, link))
    path, fragment = unquote(target.path), unquote(target.fragment)
    return file_of(path).is_file() and (not fragment or fragment in read(path).ids)
