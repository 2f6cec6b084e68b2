"""Mutated files of every artifact: each must load as what was written, or be refused by a sentence that names it.

python -m tests.fuzz --mutants 100000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import math
import random
import re
import resource
import struct
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of

from swan import Calibration, Plan, SwanCache, attach
from swan.calibration.files import _checksum, read_json
from swan.integrations.transformers.pretrained import CALIBRATION, PLAN, _read
from tests.tiny import logits_of, tiny, tokens, with_effects

DATA = Path(__file__).parent / "data"
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SECONDS, LONGEST = 2.0, 900  # of a load, and characters of a message
ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, -0.0, 1e300, "", "x", "../../x", "nan", "\0", [], {}]
ODD += [[1], [[8, 8]], {"a": 1}, ["x"] * 5, math.nan, math.inf, [[[]]], "é" * 50, "__class__", [0] * 1000]


@dataclass
class Artifact:
    """A kind of file: a good one, how it is read, what of it must be equal, and how it is written again."""

    name: str
    content: bytes
    read: Callable[[Path], Any]
    values: Callable[[Any], Any]
    write: Callable[[Any, Path], None]
    has_checksum: bool


def artifacts(folder: Path) -> list[Artifact]:
    """Make an artifact of each kind and format; those of earlier formats are in tests/data."""
    calibration = with_effects(_old_calibration(DATA / "calibration-3.safetensors"))
    plan = Plan.from_json((DATA / "plan-1.json").read_text())
    model = tiny(**SMALL)
    attach(model, calibration)
    cache = SwanCache.load(DATA / "cache-2.safetensors", model)
    sliding = tiny("gemma3", **SMALL)
    attach(sliding, _calibrated(sliding))
    hybrid = SwanCache(sliding, retention=0.6, static=True, max_length=60, buffer=8, sinks=2)
    logits_of(sliding, hybrid, input_ids=tokens(2, 30))
    calibration.save(folder / "calibration")
    cache.save(folder / "cache")
    hybrid.save(folder / "hybrid")
    calibration.save(folder / CALIBRATION)

    def read_folder(file: Path) -> Any:
        (file.parent / PLAN).unlink(missing_ok=True)
        file.rename(file.parent / PLAN)
        (file.parent / CALIBRATION).write_bytes((folder / CALIBRATION).read_bytes())
        return _read(file.parent)[1]

    def read_plan(file: Path) -> Plan:
        try:
            return Plan.from_json(read_json(file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    def write_plan(plan: Plan, file: Path) -> None:
        file.write_text(plan.to_json())

    calibrations = (_values_of_calibration, Calibration.save)
    caches = (lambda file: SwanCache.load(file, model), _values_of_cache, SwanCache.save)
    hybrids = (lambda file: SwanCache.load(file, sliding), _values_of_cache, SwanCache.save)
    old = (DATA / "calibration-3.safetensors").read_bytes()
    json_plan = (DATA / "plan-1.json").read_bytes()
    return [
        Artifact("calibration", (folder / "calibration").read_bytes(), Calibration.load, *calibrations, True),
        Artifact("calibration of format 3", old, _old_calibration, *calibrations, False),
        Artifact("cache", (folder / "cache").read_bytes(), *caches, True),
        Artifact("cache of format 2", (DATA / "cache-2.safetensors").read_bytes(), *caches, False),
        Artifact("static cache with sliding layers", (folder / "hybrid").read_bytes(), *hybrids, True),
        Artifact("plan", plan.to_json().encode(), read_plan, lambda plan: plan, write_plan, False),
        Artifact("plan without a format", json_plan, read_plan, lambda plan: plan, write_plan, False),
        Artifact("plan in a folder", plan.to_json().encode(), read_folder, lambda plan: plan, write_plan, False),
    ]


def _old_calibration(file: Path) -> Calibration:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # its effects are of other layouts
        return Calibration.load(file)


def outcome(artifact: Artifact, original: Any, rng: random.Random, folder: Path) -> str:
    """Mutate an artifact once, or a few times, read it, and say what came of it.

    Raises:
        AssertionError: it is none of what may come of it.
    """
    content, is_signed = mutated(artifact, rng)
    file = folder / "mutant"
    file.write_bytes(content)
    begun = time.process_time()
    try:
        value = artifact.read(file)
    except ValueError as error:
        message = str(error)
        assert str(folder) in message, f"names no file: {message}"
        assert "\n" not in message and len(message) < LONGEST, f"is no short sentence: {message}"
        return "refused: " + _kind(message.replace(str(folder), ""))
    finally:
        assert time.process_time() - begun < SECONDS, "takes too long"
    if _same(artifact.values(value), original):
        return "loaded equal"
    assert is_signed or not artifact.has_checksum, "loaded something else"
    again = folder / "again"
    artifact.write(value, again)  # what a reader takes its writer writes, and it comes back
    assert _same(artifact.values(artifact.read(again)), artifact.values(value)), "did not come back"
    return "loaded as changed, with a valid checksum" if artifact.has_checksum else "loaded as changed, no checksum"


def mutated(artifact: Artifact, rng: random.Random) -> tuple[bytes, bool]:
    """Return a mutant of an artifact, and whether its checksum was made anew."""
    if rng.random() < 0.4:
        content = artifact.content
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            content = rng.choice(RAW)(content, rng)
        return content, False
    if artifact.content[:1] == b"{":
        return _mutated_json(artifact.content.decode(), rng).encode("utf-8", "surrogatepass"), True
    return _mutated_tensors(artifact.content, rng)


def _place(content: bytes, rng: random.Random) -> int:
    """Choose a byte, one of the header in half of all cases."""
    return rng.randrange(min(len(content), rng.choice([16, 2000, 2**30])) or 1)


def _flip(content: bytes, rng: random.Random) -> bytes:
    place = _place(content, rng)
    return (
        content[:place]
        + bytes([byte ^ 1 << rng.randrange(8) for byte in content[place : place + 1]])
        + content[place + 1 :]
    )


def _overwrite(content: bytes, rng: random.Random) -> bytes:
    place, count = _place(content, rng), rng.choice([1, 4, 8, 100])
    return (
        content[:place] + rng.choice([rng.randbytes(count), b"\0" * count, b"\xff" * count]) + content[place + count :]
    )


def _cut(content: bytes, rng: random.Random) -> bytes:
    place = _place(content, rng)
    return content[:place] + content[place + rng.choice([1, 8, 100, 2**30]) :]


def _double(content: bytes, rng: random.Random) -> bytes:
    place = _place(content, rng)
    return content[: place + rng.choice([1, 8, 100])] + content[place:]


RAW: list[Callable[[bytes, random.Random], bytes]] = [
    _flip,
    _flip,
    _overwrite,
    _cut,
    _double,
    lambda content, rng: content + rng.randbytes(rng.choice([1, 100, 10_000])),
    lambda content, rng: struct.pack("<Q", rng.choice([0, 1, 2**20, 2**25, 2**40, 2**63, 2**64 - 1])) + content[8:],
    lambda content, rng: rng.choice([b"", b"{}", b"[]", b"null", b"\xff\xfe{", b"[" * 100_000, b'{"a":' * 50_000]),
]


def _mutated_json(text: str, rng: random.Random) -> str:
    """Change the values, keys or formatting of JSON text."""
    match rng.randrange(8):
        case 0:  # the same in other clothes
            return json.dumps(json.loads(text), indent=rng.choice([None, 1, 4]), sort_keys=True)
        case 1:
            key = rng.choice(re.findall(r'"(\w+)":', text) or ["x"])
            return text.replace(f'"{key}":', f'"{key}": 1, "{key}":', 1)
        case 2:
            return re.sub(r"\d+", lambda _: rng.choice(["1e999", "NaN", "9" * 5000, "-1", "2e0", "07"]), text, count=1)
        case 3:
            return text.replace(":", ":" + rng.choice(["[", '{"a":']) * rng.choice([1, 100, 20_000]), 1)
    values = json.loads(text)
    for _ in range(rng.choice([1, 1, 3])):
        parent, key = _any_place(values, rng)
        match rng.randrange(4):
            case 0 if isinstance(parent, dict):
                parent[rng.choice(["odd", "", "format", "__class__"])] = copy.deepcopy(rng.choice(ODD))
            case 1 if parent:
                del parent[key]
            case 2 if isinstance(parent, list) and parent:
                parent.insert(key, parent[key])
            case _ if parent:
                number = parent[key]
                near = (
                    number + rng.choice([-1, 1, 8]) if type(number) in (int, float) else copy.deepcopy(rng.choice(ODD))
                )
                parent[key] = rng.choice([near, copy.deepcopy(rng.choice(ODD))])
    return json.dumps(values)


def _any_place(values: Any, rng: random.Random) -> tuple[Any, Any]:
    """Choose a place in JSON values, which may be deep down; return what it is in, and its key there."""
    while True:
        key = rng.choice(list(values)) if isinstance(values, dict) else rng.randrange(len(values))
        if not isinstance(values[key], dict | list) or not values[key] or rng.random() < 0.2:
            return values, key
        values = values[key]


def _mutated_tensors(content: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """Change the header of a safetensors file as text, or its values and tensors, then with a checksum made anew."""
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].decode()
    if rng.random() < 0.3:
        changed = _mutated_json(header, rng).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(changed)) + changed + content[8 + size :], False
    texts, tensors = json.loads(header)["__metadata__"], tensors_of(content)
    if rng.random() < 0.4:
        texts["swan"] = _mutated_json(texts["swan"], rng)
    else:
        for _ in range(rng.choice([1, 1, 3])):
            _mutate_tensor(tensors, rng)
    signs = rng.random() < 0.8
    if signs and "sha256" in texts:
        try:
            texts["sha256"] = _checksum(texts["swan"], tensors)
        except (ValueError, RecursionError):  # that is no JSON any more
            signs = False
    return bytes_of({name: t.contiguous() for name, t in tensors.items()}, texts), signs


def _mutate_tensor(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    t = tensors[name].clone()
    match rng.randrange(9):
        case 0:
            del tensors[name]
            return
        case 1:
            name = rng.choice(
                ["odd", "99." + name, "-1.keys", "layers.9.key_basis", "0.crop", "0.__class__", name + "x", ""]
            )
        case 2:
            t = t[None]
        case 3:
            t = torch.cat([t, t]) if t.ndim else t
        case 4:
            t = t.to(rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]))
        case 5:
            t = t.new_zeros(rng.choice([(0,), (), (1, 1, 1, 1), (0, 2**40), (3,)]))
        case _ if t.numel():
            value = rng.choice([math.nan, math.inf, 1e30, 1.0, -1.0, 0.0, 2.0**40, 2.0**62])
            value = value if t.is_floating_point() else rng.choice([0, 1, 7, 8, 63, 100, 127])
            if rng.random() < 0.5:
                t.fill_(value)
            else:
                t.view(-1)[rng.randrange(t.numel())] = value
    tensors[name] = t


def _calibrated(model: Any) -> Calibration:
    from swan import calibrate

    return calibrate(model, [tokens(2, 100, seed=1)], progress=False)


def _values_of_calibration(calibration: Calibration) -> Any:
    tensors = [t for layer in (*calibration.layers, *calibration.moments) for t in vars(layer).values()]
    effects = calibration.effects
    tensors += [] if effects is None else [effects.keys, effects.values]
    return calibration.basis, calibration.seed, calibration.fingerprint, tensors


def _values_of_cache(cache: SwanCache) -> Any:
    layers = [
        layer.kv.state_dict() if hasattr(layer, "kv") else {n: v for n, v in vars(layer).items() if n != "device"}
        for layer in cache.layers
    ]
    budget = cache.byte_budget
    settings = (cache.prefill, cache.static, cache.max_length, cache.exclude, cache.plan, cache.dial.levels)
    return settings, cache.dial.retentions, budget and (budget.nbytes, budget.on_full, budget.warned), layers


def _same(a: Any, b: Any) -> bool:
    """Tell if values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and bytes_of({"t": a.contiguous()}) == bytes_of({"t": b.contiguous()})
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def _kind(message: str) -> str:
    """Shorten a message to what is the same of all mutants."""
    message = message.partition("(")[2] or message
    return re.sub(r"'.*|[\d.]+|\[.*", "#", message).partition(";")[0][:60]


def main() -> None:
    """Try mutants, in turn of each artifact; print how many ended in what way, and end with 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures, begun = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = artifacts(folder)
        (folder / "m").mkdir()
        originals = []
        for kind in kinds:
            (folder / "m" / "mutant").write_bytes(kind.content)
            originals.append(kind.values(kind.read(folder / "m" / "mutant")))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(arguments.mutants):
            kind, original = kinds[i % len(kinds)], originals[i % len(kinds)]
            try:
                counts[kind.name][outcome(kind, original, random.Random(f"{arguments.seed}/{i}"), folder / "m")] += 1
            except Exception as error:
                failures += 1
                print(f"FAILED: mutant {i}, {kind.name}: {type(error).__name__}: {str(error)[:300]}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    for kind_name, of_kind in counts.items():
        print(f"\n{kind_name}: {of_kind.total()} mutants")
        for what, count in of_kind.most_common(12):
            print(f"  {count:6} {what}")
        others = of_kind.most_common()[12:]
        if others:
            print(f"  {sum(count for _, count in others):6} in {len(others)} other ways")
    taken = time.perf_counter() - begun
    print(
        f"\n{arguments.mutants} mutants, {failures} failed, {taken:.0f} s, {grown:.0f} MiB more memory than before them"
    )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
