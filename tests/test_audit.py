"""What `make check` says of licences and vulnerabilities; the package index is not asked here."""

import subprocess
from email.message import Message
from pathlib import Path

import pytest

from tests import audit


def metadata(version="1.0", **fields):
    message = Message()
    message["Version"] = version
    for name, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            message[name.replace("_", "-")] = one
    return message


@pytest.mark.parametrize(
    ("fields", "text", "permissive"),
    [
        ({"License_Expression": "MIT AND Zlib", "License": "GPL"}, "MIT AND Zlib", True),
        ({"License_Expression": "MIT AND GPL-3.0-only"}, "MIT AND GPL-3.0-only", False),
        ({"License_Expression": "MIT OR GPL-3.0-only"}, "MIT OR GPL-3.0-only", True),
        ({"Classifier": ["Typing :: Typed", "License :: OSI Approved :: MIT License"]}, "MIT License", True),
        ({"Classifier": ["License :: OSI Approved"], "License": "BSD\nmore"}, "BSD", True),
        ({"License": "GNU Lesser General Public License"}, "GNU Lesser General Public License", False),
        ({"License_Expression": "LicenseRef-Own"}, "LicenseRef-Own", False),
        ({}, "", False),
    ],
)
def test_licences_are_read_and_judged(fields, text, permissive):
    assert audit.licence(metadata(**fields)) == text
    assert audit.is_permissive(text) == permissive


def test_a_package_without_a_known_licence_is_named(capsys):
    packages = {
        "a": metadata(License="MIT"),
        "b": metadata(),
        "chardet": metadata(License="LGPL"),
        "nvidia-x": metadata(),
    }
    assert audit.check_licences(packages) == ["b: no licence"]
    assert capsys.readouterr().out == "licences of 4 packages: permissive, or known: chardet, nvidia-x\n"


ANSWER = """{"dependencies": [
    {"name": "numpy", "version": "1.0", "vulns": []},
    {"name": "torch", "version": "2.0", "vulns": [
        {"id": "X-1", "fix_versions": ["2.1"]}, {"id": "X-2", "fix_versions": []}]},
    {"name": "own", "skip_reason": "not found"}]}"""  # fmt: skip


def answers(monkeypatch, stdout, stderr=""):
    asked = []

    def run(command, **_):
        asked.append(Path(command[command.index("--requirement") + 1]).read_text())
        return subprocess.CompletedProcess(command, 1, stdout, stderr)

    monkeypatch.setattr(audit.subprocess, "run", run)
    return asked


def test_vulnerabilities_are_named_with_the_versions_that_mend_them(monkeypatch, capsys):
    asked = answers(monkeypatch, ANSWER)
    packages = {"numpy": metadata(), "torch": metadata("2.0+cpu"), "own": metadata(), "pip": metadata()}
    lines = audit.check_vulnerabilities(packages)
    assert lines == ["torch 2.0: X-1, fixed in 2.1", "torch 2.0: X-2, fixed in no version"]
    assert asked == ["numpy==1.0\n", "numpy==1.0\ntorch==2.0\nown==1.0\n"]
    assert capsys.readouterr().out == "vulnerabilities of 2 packages: 2; no records of 1\n"


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason"),
    [
        (
            '{"dependencies": [{"name": "numpy", "skip_reason": "not found"}]}',
            "",
            "the package index has no records of any",
        ),
        ("", "python: No module named pip_audit\n", "python: No module named pip_audit"),
        ("", "Traceback\n  ...\nConnectionError: no network\n", "ConnectionError: no network"),
    ],
)
def test_an_index_that_cannot_be_asked_is_asked_once(monkeypatch, capsys, stdout, stderr, reason):
    asked = answers(monkeypatch, stdout, stderr)
    assert audit.check_vulnerabilities({"numpy": metadata(), "torch": metadata()}) == []
    assert capsys.readouterr().out == f"vulnerabilities: not looked up, {reason}\n"
    assert asked == ["numpy==1.0\n"]
