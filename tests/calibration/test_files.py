"""Files of swan: earlier formats load, mutants never harm, and a write that breaks off changes nothing."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from swan import Calibration, LayerPlan, Plan, SwanCache, TopK, attach, calibrate
from swan.calibration import files
from swan.calibration.files import MOST_BYTES, check_place, parse_json, replacing, write_json, write_tensors
from swan.integrations.transformers import cache_keyword
from tests.fuzz import DATA, SMALL, artifacts, outcome
from tests.tiny import tiny, tokens, with_effects

with warnings.catch_warnings(action="ignore"):
    OLD = with_effects(Calibration.load(DATA / "calibration-3.safetensors"))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Artifacts of all kinds, and what each is before it is mutated."""
    folder = tmp_path_factory.mktemp("artifacts")
    (folder / "m").mkdir()
    read = []
    for artifact in artifacts(folder):
        (folder / "m" / "mutant").write_bytes(artifact.content)
        read.append((artifact, artifact.values(artifact.read(folder / "m" / "mutant"))))
    return read


# Files of earlier formats --------------------------------------------------------------------------


def test_effects_of_other_layouts_are_left_out():
    with pytest.warns(UserWarning, match="an older version of swan, which measured effects of other codes"):
        found = Calibration.load(DATA / "calibration-3.safetensors")
    assert found.effects is None


def test_files_of_the_first_formats_load():
    plan = Plan.from_json((DATA / "plan-1.json").read_text())
    assert (OLD.basis, OLD.seed, OLD.tokens, OLD.dims) == ("joint", 0, 200, [(8, 8)] * 2)
    model = tiny(**SMALL)
    attach(model, OLD)
    cache = SwanCache.load(DATA / "cache-2.safetensors", model)
    assert (cache.plan, cache.get_seq_length(), cache.winnowed[1].history_length) == (plan, 40, 30)
    with torch.no_grad():
        model(tokens(1, 3), **{cache_keyword(model): cache})
    assert cache.get_seq_length() == 43


def test_files_written_now_have_a_checksum_and_a_format(tmp_path):
    OLD.save(tmp_path / "file")
    header = json.loads((tmp_path / "file").read_bytes()[8:].partition(b"}}")[0] + b"}}")["__metadata__"]
    assert len(header["sha256"]) == 64
    assert json.loads(header["swan"])["format"] == "swan-calibration-8"
    assert json.loads(Plan.for_retention(0.5, OLD).to_json())["format"] == "swan-plan-1"


def test_a_plan_of_a_later_format_is_refused():
    text = Plan.for_retention(0.5, OLD).to_json().replace("swan-plan-1", "swan-plan-2")
    with pytest.raises(ValueError, match="reads the format 'swan-plan-1'"):
        Plan.from_json(text)


# Mutants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_mutants_are_refused_or_equal(originals, seed, tmp_path):
    for i in range(100):
        artifact, original = originals[i % len(originals)]
        outcome(artifact, original, random.Random(f"{seed}/{i}"), tmp_path)


@pytest.mark.slow
def test_many_mutants():
    run = subprocess.run([sys.executable, "-m", "tests.fuzz", "--mutants", "20000", "--seed", "7"], check=False)
    assert run.returncode == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"bits": 4, "bits": 8}', "'bits' comes twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[NaN]", "no finite number"),
        ("[1e999]", "no finite number"),
        ("9" * 5000, "digits"),
    ],
)
def test_json_that_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "long", "sparse", "header"])
def test_other_things_than_files_are_refused_at_once(kind, tmp_path):
    path = tmp_path / "thing"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = "/dev/zero"
        case "long":
            path.write_bytes(b" " * (MOST_BYTES + 9))
        case "sparse":
            with path.open("wb") as file:
                file.truncate(2**40)
        case "header":
            path.write_bytes((2**24).to_bytes(8, "little") + b" " * 2**24)
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"run swan\.calibrate again|is a folder, and no file of a calibration"):
        Calibration.load(path)
    if kind != "sparse":
        with pytest.raises(ValueError, match=r"."):
            Plan.from_json(files.read_json(path))
    assert time.perf_counter() - begun < 2


def test_a_loaded_calibration_does_not_change_with_its_file(tmp_path):
    path = tmp_path / "file"
    OLD.save(path)
    loaded = Calibration.load(path)
    before = loaded.layers[0].key_basis.clone()
    path.write_bytes(b"\x40" * path.stat().st_size)  # in place
    assert torch.equal(loaded.layers[0].key_basis, before)


# Writers check what readers do ---------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["basis", "moment", "effects", "fingerprint", "number"])
def test_a_calibration_that_would_not_load_is_not_saved(broken, tmp_path):
    path = tmp_path / "file"
    OLD.save(path)
    before, broken_one = path.read_bytes(), Calibration.load(path)
    match broken:
        case "basis":
            broken_one.layers[1].key_basis[0, 0] *= 1.01
        case "moment":
            broken_one.moments[0].v[0, 0, 0] = float("nan")
        case "effects":
            broken_one.effects.keys[0, 0] = float("inf")
        case "fingerprint":
            broken_one.fingerprint.clear()
        case "number":
            broken_one.fingerprint["head_dim"] = float("nan")
    with pytest.raises(ValueError):
        broken_one.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["file"]


def test_a_plan_that_would_not_load_is_not_written():
    with pytest.raises(ValueError, match="buffer and sinks must be below"):
        Plan((None,), buffer=2**31).to_json()


def test_layouts_that_would_not_load_are_not_written():
    with pytest.raises(ValueError, match="whole numbers"):
        Plan((LayerPlan(TopK(64.0, 32), TopK(64, 32)),)).to_json()


# Writes that break off -----------------------------------------------------------------------------


def test_a_killed_writer_leaves_the_old_file_and_nothing_that_grows(tmp_path):
    path = tmp_path / "file"

    def write_for_ever(ready):
        tensors = {"a": torch.zeros(2**20)}
        while True:
            write_tensors(path, tensors, {"format": "x"})
            ready.set()

    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        ready = context.Event()
        writer = context.Process(target=write_for_ever, args=(ready,), daemon=True)
        writer.start()
        assert ready.wait(60)
        time.sleep(0.003 * attempt)
        writer.kill()
        writer.join()
        _, tensors = files.read_tensors(path, ("x",), "thing", "")
        assert tensors["a"].numel() == 2**20
        assert len(os.listdir(tmp_path)) <= 2  # the file, and what the last one left
    write_tensors(path, {"a": torch.zeros(3)}, {"format": "x"})
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_another_process_is_writing_stays(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first:
        with replacing(path) as second:
            for name in (first, second):
                write_json(name, [name])
        assert json.loads(path.read_text()) == [second]
    assert json.loads(path.read_text()) == [first]
    assert os.listdir(tmp_path) == ["file"]


def limited(size):
    """Let no file of this process have more bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.fixture
def full_disk():
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    yield lambda: limited(1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    model = tiny(**SMALL)
    attach(model, OLD)
    cache = SwanCache.load(DATA / "cache-2.safetensors", model)
    writers = {"calibration": OLD.save, "cache": cache.save, "json": lambda path: write_json(path, ["x" * 2000])}
    for name in writers:
        (tmp_path / name).write_text("old")
    full_disk()
    for name, write in writers.items():
        with pytest.raises(OSError, match=f"{name} could not be written, and is as it was .*; make room"):
            write(tmp_path / name)
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == dict.fromkeys(writers, "old")


def test_a_link_is_replaced_and_not_what_it_names(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        write_json(tmp_path / name, [1])
        assert not (tmp_path / name).is_symlink() and json.loads((tmp_path / name).read_text()) == [1]
    assert (tmp_path / "target").read_text() == "precious"


def test_strays_are_not_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").write_text("precious")
    (tmp_path / ".file.abcdefgh.swan-tmp").symlink_to("folder")
    write_json(tmp_path / "file", [1])
    assert (tmp_path / "folder" / "precious").read_text() == "precious"


def test_places_that_cannot_be_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "no plain file"),
        ("/dev/null", "no plain file"),
    ):
        for write in (check_place, lambda path: write_json(path, [])):
            with pytest.raises(ValueError, match=reason):
                write(path)
    with pytest.raises(OSError, match=r"cannot be written: .*file is no folder"):
        check_place(tmp_path / "file" / "below")
    check_place(tmp_path / "new" / "deep" / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


def test_names_that_are_nearly_too_long(tmp_path):
    write_json(tmp_path / ("x" * 250), [1])
    assert os.listdir(tmp_path) == ["x" * 250]


# What does not matter ------------------------------------------------------------------------------


def test_dtype_place_and_formatting_are_no_part_of_an_identity(tmp_path):
    model = tiny(**SMALL)
    OLD.check_model(model.to(torch.bfloat16))
    model.save_pretrained(tmp_path / "somewhere")
    loaded = type(model).from_pretrained(tmp_path / "somewhere", dtype=torch.float16)
    OLD.check_model(loaded)
    attach(loaded, OLD)
    SwanCache.load(DATA / "cache-2.safetensors", loaded)
    OLD.save(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    values = json.loads(header["__metadata__"]["swan"])
    header["__metadata__"]["swan"] = json.dumps(dict(reversed(values.items())), indent=3)
    text = json.dumps(header, indent=1).encode()
    (tmp_path / "b").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    assert torch.equal(Calibration.load(tmp_path / "b").layers[1].key_basis, OLD.layers[1].key_basis)


def test_a_cache_of_another_model_with_the_same_bases_is_refused(tmp_path):
    models = [tiny(**SMALL), tiny("qwen2", **SMALL)]
    for model in models:
        attach(model, calibrate(model, [tokens(1, 30)], "identity", progress=False))
    SwanCache(models[0], retention=0.5).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="cache was filled by another model; load that one"):
        SwanCache.load(tmp_path / "cache", models[1])
