"""Every use of a cache on every architecture: token-exact where everything is kept, or refused with its reason."""

import re
import sys

import pytest
import torch

from swan import KVCache, supported
from swan.integrations.architectures import ARCHITECTURES as KNOWN
from tests.matrix import CACHES, REFUSED, TOO, USES, cell, cells, expected, model_type, refusal
from tests.strategies import one_thread  # noqa: F401
from tests.tiny import ARCHITECTURES

QUICK = {("llama", name, kind) for name in USES for kind in CACHES}
QUICK |= {(architecture, "left padding", "dynamic") for architecture in ARCHITECTURES}
QUICK |= {(architecture, "greedy", "dynamic") for architecture in ARCHITECTURES}


@pytest.mark.parametrize(
    ("architecture", "name", "kind"),
    [pytest.param(*key, marks=() if key in QUICK else pytest.mark.slow) for key in cells()],
)
def test_cell(architecture, name, kind):
    assert re.match(expected(architecture, name), cell(architecture, name, kind))


CAN_FAIL = [("llama", name) for name in USES if refusal("llama", name) is None]
CAN_FAIL += [(architecture, "greedy") for architecture in ARCHITECTURES if architecture not in (*REFUSED, "llama")]


@pytest.mark.parametrize(("architecture", "name"), CAN_FAIL)
def test_a_cell_notices_a_wrong_attention(architecture, name, monkeypatch):
    """One that stays exact where a cache answers nothing but sevens could not fail."""
    forward = KVCache.forward
    monkeypatch.setattr(sys.modules["swan.integrations.transformers.attach"], "try_cache", lambda *_: None)
    monkeypatch.setattr(KVCache, "forward", lambda *given, **more: torch.full_like(forward(*given, **more), 7.0))
    with pytest.raises(AssertionError, match="other tokens"):
        cell(architecture, name)


def test_what_transformers_refuses_itself():
    assert cell("gemma3", "assistant", "static").startswith(TOO)
    assert cell("lfm2", "select rows").startswith(TOO)


def test_what_is_said_to_work_is_what_is_tested():
    assert {model_type(architecture) for architecture in ARCHITECTURES} == set(KNOWN)
    assert {model_type(name) for name in ARCHITECTURES if name not in REFUSED} == {
        n for n in KNOWN if KNOWN[n].supported
    }
    assert {row["architecture"]: row["supported"] for row in supported()} == {n: x.supported for n, x in KNOWN.items()}
