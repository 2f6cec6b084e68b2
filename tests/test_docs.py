"""The pages of the site: their code runs, and every public name has a page. docs/tests checks them as built."""

import re
import sys
from pathlib import Path

import pytest

import swan

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import tables  # noqa: E402

from tests.compilers import needs_cxx  # noqa: E402

CODE = re.compile(r'^```python exec="on"[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
SLOW = [name for name, text in PAGES.items() if "load_model(" in text or name == "tutorials/02-own-transformer.md"]
COMPILED = [name for name, text in PAGES.items() if "torch.compile(" in text]


def page_param(name: str):
    marks = [mark for mark, names in ((pytest.mark.slow, SLOW), (needs_cxx, COMPILED)) if name in names]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("page", [page_param(name) for name in PAGES if CODE.search(PAGES[name])])
def test_the_code_of_a_page_runs(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {"__name__": page}
    for code in CODE.findall(PAGES[page]):
        exec(compile(code, page, "exec"), names)


def test_every_public_name_has_a_page():
    here = {n for n, x in vars(swan).items() if n[0] != "_" and getattr(x, "__module__", "").startswith("swan")}
    names = [name for group in tables.GROUPS.values() for name in group]
    assert sorted(names) == sorted(here | set(swan._LAZY))
    listed = re.findall(r"\S+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    for name in names:
        holders = [page for page, text in PAGES.items() if f"::: swan.{name}" in text.splitlines()]
        assert holders == [f"api/{name}.md"]
        assert listed.count(f"api/{name}.md") == 1
