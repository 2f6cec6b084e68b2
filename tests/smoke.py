"""What a release must do where nothing but swan and what it needs is installed; `make release-check` runs it there.

It imports nothing of the tests, and no extra may be installed. Expected: every call works in tensor code or says which
extra it needs.
"""

import importlib.util
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

import swan

EXTRAS = ("transformers", "typer", "ninja", "matplotlib", "lm_eval", "pytest", "jaxtyping")


def main() -> None:
    """Raise AssertionError where something is not as expected."""
    torch.manual_seed(0)
    present = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert present == [], f"not an empty environment: {present}"
    assert "site-packages" in swan.__file__, swan.__file__
    check_functions()
    check_cache()
    check_own_model()
    check_absent_extras()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "einops", "safetensors"))
    print(f"smoke test of swan {swan.__version__}: passed with {packages}")


def check_functions() -> None:
    """Packed attention is that over what the packed vectors unpack to; a warning says what would be faster."""
    q, k, v = torch.randn(1, 4, 1, 64), *torch.randn(2, 1, 2, 40, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for layout in (swan.Graded(((16, 5), (32, 3), (16, 0))), swan.TopK(64, keep=32)):
            keys, values = swan.pack(k, layout), swan.pack(v, layout)
            expected = swan.dense_attention(q, swan.unpack(keys), swan.unpack(values))
            torch.testing.assert_close(swan.packed_attention(q, keys, values), expected)
    assert ["swan-attention[cpp]" in str(warning.message) for warning in caught] == [True], caught


def check_cache() -> None:
    """A cache takes a prompt and a step, growing or static."""
    for static in (False, True):
        layer = swan.Plan.for_retention(0.33, dims=[(64, 64)]).layers[0]
        cache = swan.KVCache(layer, buffer=8, sinks=2, static=static, max_length=50 if static else None)
        for tokens in (40, 1):
            q, k, v = torch.randn(1, 4, tokens, 64), *torch.randn(2, 1, 2, tokens, 64)
            out = cache(q, k, v)
            assert out.shape == q.shape and out.isfinite().all()
        assert int(cache.history_length) == 41 - 8 - 2


def check_own_model() -> None:
    """A model of one's own is calibrated, and its calibration saved, loaded and attached."""
    model = torch.nn.Sequential(swan.SwanAttention(64, heads=4))
    calibration = swan.calibrate(model, [torch.randn(2, 50, 64)], progress=False)
    with tempfile.TemporaryDirectory() as folder:
        calibration.save(Path(folder) / "calibration.safetensors")
        swan.attach(model, Path(folder) / "calibration.safetensors")
    assert torch.equal(model[0].key_basis, calibration.layers[0].key_basis)


def check_absent_extras() -> None:
    """What needs an extra names it."""
    refused(lambda: swan.SwanCache, ImportError, "swan-attention[hf]")
    refused(lambda: swan.from_pretrained, ImportError, "swan-attention[hf]")
    refused(lambda: swan.attach(torch.nn.Linear(2, 2), _calibration()), ImportError, "swan-attention[hf]")
    packed = swan.pack(torch.randn(1, 2, 9, 64), swan.TopK(64, keep=32))
    refused(lambda: swan.packed_attention(torch.randn(1, 4, 1, 64), packed, packed, impl="cpp"), RuntimeError, "[cpp]")
    command = Path(sys.executable).with_name("swan")
    done = subprocess.run([command, "info"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "swan-attention[cli,hf]" in done.stderr, done


def refused(call: Callable[[], object], error: type[Exception], words: str) -> None:
    """Check that a call raises an error that says these words."""
    try:
        call()
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"nothing was raised that says {words}")


def _calibration() -> swan.Calibration:
    model = torch.nn.Sequential(swan.SwanAttention(64, heads=4))
    return swan.calibrate(model, [torch.randn(2, 50, 64)], progress=False)


if __name__ == "__main__":
    main()
