"""Perplexity, KL and agreement of compressed caches against the dense one, with compression active."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swan.calibration import Calibration, Plan
from swan.calibration.bases import Basis
from swan.calibration.progress import track
from swan.integrations import attach, detach
from swan.packed import Graded, Layout, PlanLayer, TopK

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["Setting", "default_sweep", "evaluate"]

CHUNK = 512  # tokens a forward takes in; the windowed form does not depend on it


@dataclass(frozen=True)
class Setting:
    """One row of a sweep: a plan and a basis.

    Args:
        plan: what the cache stores; None for the dense cache.
        basis: in which coordinates.
        seed: of a random basis.
    """

    plan: Plan | None = None
    basis: Basis = "joint"
    seed: int = 0

    @property
    def form(self) -> str:
        """``"dense"``, ``"window"``, or the form of the keys of the first layer: ``"topk"`` or ``"graded"``."""
        if self.plan is None:
            return "dense"
        first = self._first_layer
        return "window" if first is None else _form(first.keys)

    @property
    def _first_layer(self) -> PlanLayer | None:
        layers = () if self.plan is None else self.plan.layers
        return next((layer for layer in layers if layer is not None), None)

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values, layouts of the first layer."""
        if self.plan is None:
            return {}
        first = self._first_layer
        about: dict[str, Any] = {"basis": self.basis, "buffer": self.plan.buffer, "sinks": self.plan.sinks}
        if self.basis == "random":
            about["seed"] = self.seed
        return about | ({} if first is None else {"keys": _describe(first.keys), "values": _describe(first.values)})


@dataclass
class _Scores:
    """Sums over the tokens of each window."""

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    compression: list[float] = field(default_factory=list)
    seconds: float = 0.0


def default_sweep(dims: Sequence[tuple[int, int]], *, buffer: int = 64, sinks: int = 4) -> list[Setting]:
    """Dense, window only, top-k at several keeps, other bases, the paper's byte format, our plans.

    Args:
        dims: head dimensions of keys and values of each layer.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense; some rows have none.
    """

    def topk(share: float, bits: int = 8, **kwargs: Any) -> Plan:
        layers = [PlanLayer(_kept(d, share, bits), _kept(dv, share, bits)) for d, dv in dims]
        return Plan(tuple(layers), **{"buffer": buffer, "sinks": sinks, **kwargs})

    def index(retention: float) -> Plan:
        layers = [PlanLayer(_indexed(d, retention), _indexed(dv, retention)) for d, dv in dims]
        return Plan(tuple(layers), buffer=buffer, sinks=sinks)

    leading = [PlanLayer(Graded.leading(d, d // 2), Graded.leading(dv, dv // 2)) for d, dv in dims]
    nothing = (None,) * len(dims)
    return [
        Setting(),
        Setting(Plan(nothing, buffer=buffer, sinks=0)),
        Setting(Plan(nothing, buffer=buffer, sinks=sinks)),
        Setting(topk(1.0, bits=16)),
        Setting(topk(0.75)),
        Setting(topk(0.5)),
        Setting(topk(0.375)),
        Setting(topk(0.5, sinks=0)),
        Setting(topk(0.5), basis="identity"),
        Setting(topk(0.5), basis="random"),
        Setting(topk(0.5), basis="pca"),
        Setting(index(0.5)),
        Setting(index(0.4)),
        Setting(Plan(tuple(leading), buffer=buffer, sinks=sinks)),
        *(Setting(Plan.for_retention(r, dims=dims, buffer=buffer, sinks=sinks)) for r in (0.5, 0.33, 0.25)),
    ]


def evaluate(
    model: "PreTrainedModel",
    windows: Tensor,
    settings: Sequence[Setting],
    calibration: Calibration,
    *,
    progress: bool = True,
) -> list[dict[str, Any]]:
    r"""Score windows of text under each setting, in windowed form: as if decoded token by token.

    Perplexity is $\exp$ of the mean negative log-likelihood of each window's tokens after its first.
    ``perplexity_increase`` is relative to the dense cache on the same tokens; its ``standard_error`` is
    paired, over windows. ``kl`` is $\mathrm{KL}(p_{dense} \| p)$ per token in nats, ``agreement`` the share
    of tokens with the same most likely next token, ``compression`` the bytes held over those of a dense
    cache in the dtype of the model, at the end of a window.

    Args:
        model: a transformers model that is not attached; it is left as it was.
        windows: token ids ``[windows, tokens]``.
        settings: what to score; a dense row is always scored first.
        calibration: of the model; other bases are made from its moments.
        progress: show a progress bar.

    Returns:
        A row for each setting, in their order, with the fields above and ``form``, ``settings``,
        ``retention``, ``seconds``.

    Raises:
        ValueError: windows are shorter than two tokens.
    """
    if windows.ndim != 2 or windows.shape[1] < 2:
        raise ValueError(f"expected windows [windows, tokens] of at least two tokens, got {list(windows.shape)}")
    settings = [s for s in settings if s.plan is not None]
    scores = [_Scores() for _ in range(len(settings) + 1)]
    for window in track(list(windows), "evaluating", show=progress):
        tokens = window.to(model.device)[None]
        _score_window(model, tokens, settings, calibration, scores)
    dense, *others = scores
    rows = [_row(Setting(), dense, dense)]
    return rows + [_row(setting, score, dense) for setting, score in zip(settings, others, strict=True)]


@torch.no_grad()
def _score_window(
    model: "PreTrainedModel",
    tokens: Tensor,
    settings: Sequence[Setting],
    calibration: Calibration,
    scores: Sequence[_Scores],
) -> None:
    from transformers import DynamicCache

    from swan.integrations.transformers import SwanCache

    start = time.perf_counter()
    reference = [logits.log_softmax(-1) for logits in _logits(model, tokens, DynamicCache(config=model.config))]
    _add(scores[0], reference, reference, tokens, 1.0, time.perf_counter() - start)
    numbered = list(zip(settings, scores[1:], strict=True))
    for (basis, seed), group in groupby(numbered, key=lambda pair: (pair[0].basis, pair[0].seed)):
        same = (basis, seed) == (calibration.basis, calibration.seed)
        attach(model, calibration if same else calibration.with_basis(basis, seed=seed))
        try:
            for setting, score in group:
                start = time.perf_counter()
                cache = SwanCache(model, setting.plan, prefill="windowed")
                found = (logits.log_softmax(-1) for logits in _logits(model, tokens, cache))
                _add(score, found, reference, tokens, None, 0.0)
                score.compression.append(cache.compression)
                score.seconds += time.perf_counter() - start
        finally:
            detach(model)


def _logits(model: "PreTrainedModel", tokens: Tensor, cache: "Cache") -> Iterator[Tensor]:
    """Logits ``[tokens, vocabulary]`` in float32, a chunk at a time."""
    from swan.integrations.transformers import cache_keyword

    keyword = {cache_keyword(model): cache}
    for start in range(0, tokens.shape[1], CHUNK):
        yield model(input_ids=tokens[:, start : start + CHUNK], use_cache=True, **keyword).logits[0].float()


def _add(
    score: _Scores,
    found: Any,
    reference: Sequence[Tensor],
    tokens: Tensor,
    compression: float | None,
    seconds: float,
) -> None:
    """Add a window: log-probabilities by chunk, against those of the dense cache."""
    count = tokens.shape[1] - 1
    nll = kl = agreement = 0.0
    for i, (log_p, log_dense) in enumerate(zip(found, reference, strict=True)):
        targets = tokens[0, i * CHUNK + 1 : (i + 1) * CHUNK + 1]
        log_p, log_dense = log_p[: len(targets)], log_dense[: len(targets)]
        nll -= log_p.gather(-1, targets[:, None]).double().sum().item()
        kl += torch.nn.functional.kl_div(log_p, log_dense, log_target=True, reduction="sum").item()
        agreement += (log_p.argmax(-1) == log_dense.argmax(-1)).sum().item()
    score.nll.append(nll / count)
    score.kl.append(kl / count)
    score.agreement.append(agreement / count)
    score.seconds += seconds
    if compression is not None:
        score.compression.append(compression)


def _row(setting: Setting, score: _Scores, dense: _Scores) -> dict[str, Any]:
    differences = [a - b for a, b in zip(score.nll, dense.nll, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    error = None
    if len(differences) > 1:
        error = ratio * statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "form": setting.form,
        "settings": setting.describe(),
        "retention": 1.0 if setting.plan is None else setting.plan.retention,
        "compression": statistics.fmean(score.compression),
        "perplexity": math.exp(statistics.fmean(score.nll)),
        "perplexity_increase": ratio - 1,
        "standard_error": error,
        "kl": statistics.fmean(score.kl),
        "agreement": statistics.fmean(score.agreement),
        "seconds": score.seconds,
    }


def _kept(d: int, share: float, bits: int) -> TopK:
    return TopK(d, max(1, round(share * d)), bits=16 if bits == 16 else 8)


def _indexed(d: int, retention: float) -> TopK:
    """The paper's byte format, a byte for the value and one for its position: all that fit."""
    return TopK(d, max(1, (math.floor(2 * d * retention) - 2) // 2), positions="index")


def _describe(layout: Layout) -> dict[str, Any]:
    return {"form": _form(layout), **asdict(layout)}


def _form(layout: Layout) -> str:
    return "topk" if isinstance(layout, TopK) else "graded"
