"""Fixtures of the tests of models and texts: an index of packages without the network, and a tokenizer."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from swan.evaluation.downloads import Wheel


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Point the cache folder at an empty place."""
    monkeypatch.setenv("SWAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Let pip see only the wheels that this function makes; it returns the pin of each."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def publish(package, version, members):
        stem = f"{package.replace('-', '_')}-{version}"
        file = folder / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)
            wheel.writestr(
                f"{stem}.dist-info/WHEEL",
                "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            wheel.writestr(
                f"{stem}.dist-info/METADATA",
                f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n",
            )
        return Wheel(package, version, hashlib.sha256(file.read_bytes()).hexdigest())

    return publish


@pytest.fixture(scope="module")
def beginning_with_bos():
    """Make a tokenizer of words that puts <bos> before a text, as Gemma's does."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    vocabulary = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {str(word): 3 + word for word in range(500)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=8,
    )
