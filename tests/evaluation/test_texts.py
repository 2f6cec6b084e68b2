"""Texts by name, and windows of their tokens."""

from __future__ import annotations

import gzip

import pytest
import torch

from swan.evaluation import texts
from swan.evaluation.models import model_folder
from swan.evaluation.texts import calibration_text, evaluation_text, token_windows

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def smollm2():
    """Load the tokenizer of the embedded model (which is fetched when the cache folder lacks it)."""
    return transformers.AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))


def test_calibration_text():
    text = calibration_text()
    assert len(text) > 300_000
    assert text.count("\n\n") > 1000


def test_the_mixed_text_takes_pages_of_both_in_turn():
    mixed, both = calibration_text("mixed"), [calibration_text("python-topics"), texts.EXCERPT.read_text("utf-8")]
    assert mixed == calibration_text()
    paragraphs = [[p.strip("\n") for p in text.split("\n\n") if p.strip("\n")] for text in (mixed, *both)]
    assert sorted(paragraphs[0]) == sorted(paragraphs[1] + paragraphs[2])
    places = [[mixed.index(p) for p in text if len(p) > 80] for text in paragraphs[1:]]
    first = 8 * texts.PAGE
    shares = [sum(place < first for place in side) for side in places]
    assert min(shares) > 20 and mixed.startswith(paragraphs[1][0])


def test_jargon_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(texts, "JARGON", tmp_path / "jargon.txt.gz")
    with pytest.raises(ValueError, match="apt-get install jargon-text"):
        calibration_text("jargon")
    texts.JARGON.write_bytes(gzip.compress(b"hacker: n."))
    assert calibration_text("jargon") == "hacker: n."


@pytest.mark.parametrize("read", [calibration_text, evaluation_text])
def test_text_files(read, tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve\n".encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("naïve\n".encode()))
    assert read(tmp_path / "a.txt") == read(str(tmp_path / "a.txt.gz")) == "naïve\n"


@pytest.mark.parametrize(
    ("read", "names"),
    [(calibration_text, "'mixed', 'python-topics', 'jargon'"), (evaluation_text, "'qasper', 'squad'")],
)
def test_unknown_text(read, names):
    with pytest.raises(ValueError, match=f"expected one of {names} or the path of a text file, got 'no-such-text'"):
        read("no-such-text")


@pytest.mark.slow
def test_real_evaluation_texts():
    papers = evaluation_text("qasper")
    assert papers.startswith("1.1em\n")
    assert len(papers) == 6_407_444
    assert evaluation_text("squad").startswith("Older than The Game by 23 years, the Harvard-Yale Regatta")


# Windows


@pytest.mark.parametrize("length", [1, 7, 63, 1000])
def test_windows_are_the_tokens_of_the_whole_text(smollm2, length):
    text = calibration_text()[:60_000] + "\n\n naïve — 😀" * 300
    whole = smollm2(text, add_special_tokens=False)["input_ids"]
    for windows in (1, 3, len(whole) // length):
        ids = token_windows(text, smollm2, windows, length)
        assert ids.shape == (windows, length)
        assert ids.dtype == torch.int64
        assert ids.flatten().tolist() == whole[: windows * length]


def test_windows_do_not_read_on(smollm2):
    """A hundred times the text costs no more: only a prefix is tokenized."""

    class Counting:
        bos_token_id = smollm2.bos_token_id
        characters = 0

        def __call__(self, text, **options):
            self.characters += len(text)
            return smollm2(text, **options)

    counting = Counting()
    token_windows(calibration_text() * 100, counting, 2, 256)
    assert counting.characters < 20_000


def test_windows_begin_as_the_tokenizer_does(beginning_with_bos):
    text = " ".join(str(word) for word in range(500))
    ids = token_windows(text, beginning_with_bos, 3, 5)
    assert ids.tolist() == [[0, 3, 4, 5, 6], [0, 7, 8, 9, 10], [0, 11, 12, 13, 14]]


def test_windows_do_not_warn_of_length(beginning_with_bos, caplog):
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        token_windows("1 " * 100, beginning_with_bos, 2, 40)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_short_text_says_how_many(beginning_with_bos):
    with pytest.raises(ValueError, match=r"at least 4 windows of 4 tokens, got 3 \(10 tokens in all\)"):
        token_windows("1 " * 10, beginning_with_bos, 4, 4)


@pytest.mark.parametrize(("windows", "length"), [(0, 5), (2, 0), (1, 1)])
def test_bad_sizes(beginning_with_bos, windows, length):
    with pytest.raises(ValueError, match=rf"windows >= 1 and length >= 2 .*windows={windows} and length={length}"):
        token_windows("1 2 3", beginning_with_bos, windows, length)
