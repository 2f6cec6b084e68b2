"""An empty prompt (transformers#3678, #13774), and bytes that are no UTF-8: an error says what to do."""

import gzip
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from swan.cli.app import app
from tests.tiny import save_with_words

BROKEN = b"\xff\xfe\x80abc\xc3\x28"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_with_words(folder)
    return str(folder)


def error_of(*arguments, given=b""):
    result = CliRunner().invoke(app, arguments, input=given)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    return " ".join(result.stderr.partition("error:")[2].split())


@pytest.mark.parametrize("dense", [(), ("--dense",)])
def test_no_prompt(folder, dense):
    for prompt in ("", "-"):
        assert (
            error_of("generate", folder, prompt, "--raw", *dense) == "the prompt is empty; give some text to go on from"
        )


def test_a_chat_may_begin_with_nothing(folder):
    result = CliRunner().invoke(app, ("generate", folder, "", "--tokens", "2", "--dense"))
    assert result.exit_code == 0, result.output


def test_bytes_on_standard_input(folder):
    said = error_of("generate", folder, "-", given=BROKEN)
    assert said == "the prompt is not UTF-8 text (byte 0 is 0xff); convert it, for example with iconv"


def test_bytes_as_an_argument(folder):
    said = error_of("generate", folder, os.fsdecode(BROKEN))
    assert said.startswith("the prompt is not UTF-8 text (byte 0 is 0xff)")


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_texts(folder, command, tmp_path):
    broken, cut, empty = tmp_path / "broken.txt", tmp_path / "cut.txt.gz", tmp_path / "empty.txt"
    broken.write_bytes(b"words " + BROKEN)
    cut.write_bytes(gzip.compress(b"words " * 999)[:-12])
    empty.write_bytes(b"")
    for file, message in (
        (broken, f"{broken} is not UTF-8 text (byte 6 is 0xff); convert it"),
        (cut, f"{cut} is not a whole gzip file"),
        (empty, "expected a text of at least"),
        (tmp_path, "expected one of"),
    ):
        assert message in error_of(command, folder, "--text", str(file))


def test_files_that_cannot_be_read_or_written(folder, tmp_path):
    assert str(tmp_path) in error_of("generate", folder, "Hello", "--calibration", str(tmp_path))
    (tmp_path / "file").write_text("")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = ("--tokens", "64", "--text", str(text), "--out", str(tmp_path / "file" / "calibration"))
    assert "file" in error_of("calibrate", folder, *options)


def test_a_process_of_its_own(folder):
    """Standard input as a shell gives it."""
    command = [sys.executable, "-W", "ignore", "-m", "swan", "generate", folder, "-"]
    done = subprocess.run(command, input=BROKEN, capture_output=True)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr and b"is not UTF-8 text" in done.stderr
