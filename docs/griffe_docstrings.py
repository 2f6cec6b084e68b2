"""Rules of our docstrings for mkdocstrings: an `Example:` is code, and an arXiv number is a link."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
FENCED = re.compile(r"^( *)Example:\n +```", re.MULTILINE)
ARXIV = re.compile(r"arXiv:((?:[a-z-]+/\d{7})|\d{4}\.\d{5})")


class Docstrings(Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if not FENCED.search(text):
            text = EXAMPLE.sub(r"\1Examples:", text)
        obj.docstring.value = ARXIV.sub(
            r"[arXiv:\1](https://arxiv.org/abs/\1)", text
        )
