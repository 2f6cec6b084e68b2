"""Dtypes that a device multiplies natively, and the one that a model runs in."""

import pytest
import torch

from swan.evaluation import dtypes
from swan.evaluation.dtypes import native_dtypes, native_or_float32
from swan.evaluation.models import automatic_dtype, load_model
from tests.tiny import save_with_words, tiny

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("capability", "has", "expected"),
    [
        ("AVX2", ["avx512_bf16"], [F32]),  # limited by ATEN_CPU_CAPABILITY
        ("AVX512", [], [F32]),
        ("AVX512", ["avx512_bf16"], [F32, BF16]),
        ("AVX512", ["amx_bf16"], [F32, BF16]),
        ("AVX512", ["avx512_bf16", "avx512_fp16"], [F32, BF16, F16]),
        ("DEFAULT", ["bf16"], [F32]),
    ],
)
def test_of_cpus(monkeypatch, capability, has, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    assert list(native_dtypes("cpu")) == expected


def test_of_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert native_dtypes("cuda") == (F32, F16)
    assert native_dtypes("mps") == (F32, F16, BF16)
    assert native_dtypes("meta") == (F32,)


SLOW = "float32, as this CPU would multiply the model's {} slowly (it lacks {} or AMX)"


@pytest.mark.parametrize(
    ("own", "native", "chosen", "reason"),
    [
        (F32, (F32,), F32, "float32, the model's own"),
        (BF16, (F32, BF16), BF16, "bfloat16, the model's own: native on this CPU"),
        (BF16, (F32,), F32, SLOW.format("bfloat16", "AVX512-BF16")),
        (F16, (F32, BF16), F32, SLOW.format("float16", "AVX512-FP16")),
    ],
    ids=["float32", "native", "bfloat16", "float16"],
)
def test_the_models_own_or_float32(monkeypatch, own, native, chosen, reason):
    monkeypatch.setattr(dtypes, "native_dtypes", lambda device: native)
    assert native_or_float32(own, "cpu") == (chosen, reason)


def test_a_models_own_dtype(monkeypatch, tmp_path):
    monkeypatch.setattr(dtypes, "native_dtypes", lambda device: (F32, BF16))
    for own, chosen in ((BF16, BF16), (F16, F32), (F32, F32)):
        tiny().to(own).save_pretrained(tmp_path)
        assert automatic_dtype(tmp_path, "cpu")[0] == chosen
    assert automatic_dtype("smollm2-135m", "cpu")[0] == BF16  # quantized files: what models are published in
    assert automatic_dtype("./some.gguf", "cpu")[0] == BF16
    with pytest.raises(ValueError, match="no model '/no/such' could be loaded"):
        automatic_dtype("/no/such", "cpu")


@pytest.mark.parametrize("native", [(F32, BF16), (F32,)], ids=["native", "not"])
def test_a_model_is_loaded_in_it(monkeypatch, tmp_path, native):
    monkeypatch.setattr(dtypes, "native_dtypes", lambda device: native)
    model, _ = save_with_words(tmp_path)
    model.to(BF16).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype="auto")
    assert model.dtype == native[-1]
