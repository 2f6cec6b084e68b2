"""Perplexity, KL and agreement of compressed caches against the dense one, with compression active."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from swan.calibration import Calibration, Plan
from swan.calibration.bases import Basis
from swan.calibration.batches import check_ids
from swan.calibration.capture import device_of
from swan.calibration.json_layouts import to_json
from swan.calibration.progress import track
from swan.integrations import attached
from swan.storage import ByHead, Graded, LayerPlan, Layout, TopK

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["Method", "Setting", "default_sweep", "evaluate"]

CHUNK = 512  # tokens a forward takes in; the windowed form does not depend on it


class Method(Protocol):
    """A way to keep the cache small that can be scored: `Setting`, or a rival of swan/evaluation/baselines."""

    @property
    def form(self) -> str:
        """Return its name."""
        ...

    @property
    def basis(self) -> Basis | None:
        """Return the basis in which the model is attached; None where the model is left as it is."""
        ...

    @property
    def seed(self) -> int:
        """Return the seed of a random basis."""
        ...

    @property
    def retention(self) -> float:
        """Return the bytes per history token over those in bf16, all that it needs included."""
        ...

    @property
    def chunk(self) -> int:
        """Return how many tokens the cache is given at a time."""
        ...

    def cache(self, model: "PreTrainedModel") -> "Cache":
        """Make an empty cache for the model."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values: ``buffer`` and ``sinks`` where tokens are kept dense."""
        ...


@dataclass(frozen=True)
class Setting:
    """One row of a sweep: a plan and a basis.

    Args:
        plan: what the cache stores; None for the dense cache.
        basis: in which coordinates.
        seed: of a random basis.
        name: a form to be shown instead of the layouts' own.
    """

    plan: Plan | None = None
    basis: Basis = "joint"
    seed: int = 0
    name: str | None = None
    chunk: int = field(default=CHUNK, init=False, repr=False)

    @property
    def form(self) -> str:
        """Return ``"dense"``, ``"window"``, or the form of the keys of the first layer: ``"topk"`` or ``"graded"``."""
        if self.name is not None:
            return self.name
        if self.plan is None:
            return "dense"
        first = self._first_layer
        return "window" if first is None else first.keys.form

    @property
    def retention(self) -> float:
        """Return the share of bytes of the plan."""
        return 1.0 if self.plan is None else self.plan.share

    def cache(self, model: "PreTrainedModel") -> "Cache":
        """Make a `SwanCache` in windowed form; the dense cache of transformers without a plan."""
        from transformers import DynamicCache

        from swan.integrations.transformers import SwanCache

        return (
            DynamicCache(config=model.config) if self.plan is None else SwanCache(model, self.plan, prefill="windowed")
        )

    @property
    def _first_layer(self) -> LayerPlan | None:
        layers = () if self.plan is None else self.plan.layers
        return next((layer for layer in layers if layer is not None), None)

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values, layouts of the first layer."""
        if self.plan is None:
            return {}
        first = self._first_layer
        about: dict[str, Any] = {"basis": self.basis, "buffer": self.plan.buffer, "sinks": self.plan.sinks}
        if self.plan.keep is not None:
            about["keep"] = self.plan.keep
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


class _Reference:
    """Predictions of the dense cache ``[tokens, vocabulary]``."""

    def __init__(self, log_p: Tensor) -> None:
        self.log_p, self.p, self.likeliest = log_p, log_p.exp(), log_p.argmax(-1)


def default_sweep(dims: Sequence[tuple[int, int]], *, buffer: int = 64, sinks: int = 4) -> list[Setting]:
    """Sweep over dense, window only, top-k at several keeps, other bases, the paper's byte format, our plans.

    Args:
        dims: head dimensions of keys and values of each layer.
        buffer: recent tokens kept dense.
        sinks: first tokens kept dense; some rows have none.
    """

    def topk(share: float, bits: int = 8, **kwargs: Any) -> Plan:
        layers = [LayerPlan(_chosen(d, share, bits), _chosen(dv, share, bits)) for d, dv in dims]
        return Plan(tuple(layers), **{"buffer": buffer, "sinks": sinks, **kwargs})

    def index(retention: float) -> Plan:
        layers = [LayerPlan(_indexed(d, retention), _indexed(dv, retention)) for d, dv in dims]
        return Plan(tuple(layers), buffer=buffer, sinks=sinks)

    leading = [LayerPlan(Graded.leading(d, d // 2), Graded.leading(dv, dv // 2)) for d, dv in dims]
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
    settings: Sequence[Method],
    calibration: Calibration,
    *,
    progress: bool = True,
    after_window: Callable[[list[dict[str, Any]]], object] | None = None,
) -> list[dict[str, Any]]:
    r"""Score windows of text under each setting, in windowed form: as if decoded token by token.

    Perplexity is $\exp$ of the mean negative log-likelihood of each window's tokens after its first.
    ``perplexity_increase`` is relative to the dense cache on the same tokens; its ``standard_error`` is
    paired, over windows. ``kl`` is $\mathrm{KL}(p_{dense} \| p)$ per token in nats, with ``kl_error`` over windows;
    ``agreement`` the share of tokens with the same most likely next token. ``compression`` is the bytes held over those
    of a dense cache in the dtype of the model, at the end of a window (None for caches that do not tell);
    ``compression_bf16`` the same by count, in bf16 and without slack: history at ``retention``, buffer and sinks dense.

    Args:
        model: a transformers model that is not attached; it is left as it was.
        windows: token ids ``[windows, tokens]``.
        settings: what to score; a dense row is always scored first.
        calibration: of the model; other bases are made from its moments.
        progress: show a progress bar.
        after_window: called with the rows so far after each window but the last, so that hours of work can be kept.

    Returns:
        A row for each setting, in their order, with the fields above and ``form``, ``settings``,
        ``retention``, ``windows`` (how many were scored), ``seconds``.

    Raises:
        TypeError: the windows are no tensor, such as a text or what a tokenizer gives.
        ValueError: they are not token ids of the model ``[windows, tokens]``, or shorter than two tokens.
    """
    check_ids(windows, model)
    if windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"expected windows [windows, tokens] of at least two tokens, got {list(windows.shape)}")
    settings = [s for s in settings if s.form != "dense"]
    scores = [_Scores() for _ in range(len(settings) + 1)]

    def rows() -> list[dict[str, Any]]:
        methods = [Setting(), *settings]
        return [_row(*pair, scores[0], windows.shape[1]) for pair in zip(methods, scores, strict=True)]

    for i, window in enumerate(track(list(windows), "evaluating", show=progress)):
        if after_window is not None and i > 0:
            after_window(rows())
        _score_window(model, window.to(device_of(model))[None], settings, calibration, scores)
    return rows()


@torch.no_grad()
def _score_window(
    model: "PreTrainedModel",
    tokens: Tensor,
    settings: Sequence[Method],
    calibration: Calibration,
    scores: Sequence[_Scores],
) -> None:
    start = time.perf_counter()
    dense = Setting()
    reference = _Reference(
        torch.cat([logits.log_softmax(-1) for logits in _logits(model, tokens, dense.cache(model), CHUNK)])
    )
    _add(scores[0], [reference.log_p], reference, tokens, 1.0, time.perf_counter() - start)
    numbered = list(zip(settings, scores[1:], strict=True))
    for (basis, seed), group in groupby(numbered, key=lambda pair: (pair[0].basis, pair[0].seed)):
        same = (basis, seed) == (calibration.basis, calibration.seed)
        used = calibration if same else None if basis is None else calibration.with_basis(basis, seed=seed)
        with attached(model, used):
            for setting, score in group:
                start = time.perf_counter()
                cache = setting.cache(model)
                chunks = (logits.log_softmax(-1) for logits in _logits(model, tokens, cache, setting.chunk))
                _add(score, chunks, reference, tokens, None, 0.0)
                score.compression.append(getattr(cache, "compression", math.nan))
                score.seconds += time.perf_counter() - start


def _logits(model: "PreTrainedModel", tokens: Tensor, cache: "Cache", chunk: int) -> Iterator[Tensor]:
    """Yield logits ``[tokens, vocabulary]`` in float32, a chunk at a time."""
    from swan.integrations.transformers import cache_keyword

    keyword = {cache_keyword(model): cache}
    for start in range(0, tokens.shape[1], chunk):
        yield model(input_ids=tokens[:, start : start + chunk], use_cache=True, **keyword).logits[0].float()


def _add(
    score: _Scores,
    chunks: Iterable[Tensor],
    reference: _Reference,
    tokens: Tensor,
    compression: float | None,
    seconds: float,
) -> None:
    """Add a window: log-probabilities by chunk, against those of the dense cache."""
    count, start = tokens.shape[1] - 1, 0
    nll = kl = agreement = 0.0
    for log_p in chunks:
        targets = tokens[0, start + 1 : start + len(log_p) + 1]
        log_p, here = log_p[: len(targets)], slice(start, start + len(targets))
        start += len(targets)
        nll -= log_p.gather(-1, targets[:, None]).double().sum().item()
        kl += torch.linalg.vecdot(reference.p[here], reference.log_p[here] - log_p).double().sum().item()
        agreement += (log_p.argmax(-1) == reference.likeliest[here]).sum().item()
    score.nll.append(nll / count)
    score.kl.append(kl / count)
    score.agreement.append(agreement / count)
    score.seconds += seconds
    if compression is not None:
        score.compression.append(compression)


def _row(setting: Method, score: _Scores, dense: _Scores, tokens: int) -> dict[str, Any]:
    differences = [a - b for a, b in zip(score.nll, dense.nll, strict=True)]
    ratio = math.exp(statistics.fmean(differences))
    about, compression = setting.describe(), statistics.fmean(score.compression)
    recent = min(about.get("buffer", 0) + about.get("sinks", 0), tokens) / tokens
    return {
        "form": setting.form,
        "settings": about,
        "retention": setting.retention,
        "compression": None if math.isnan(compression) else compression,
        "compression_bf16": recent + (1 - recent) * setting.retention,
        "perplexity": math.exp(statistics.fmean(score.nll)),
        "perplexity_increase": ratio - 1,
        "standard_error": _standard_error(differences, ratio),
        "kl": statistics.fmean(score.kl),
        "kl_error": _standard_error(score.kl, 1.0),
        "agreement": statistics.fmean(score.agreement),
        "windows": len(score.nll),
        "seconds": score.seconds,
    }


def _standard_error(values: Sequence[float], factor: float) -> float | None:
    """Compute the standard error of the mean over windows; NaN where one of them has no finite value."""
    if not all(map(math.isfinite, values)):  # statistics.stdev raises what it does not say
        return math.nan
    return factor * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _chosen(d: int, share: float, bits: int) -> TopK:
    return TopK(d, max(1, round(share * d)), bits=16 if bits == 16 else 8)


def _indexed(d: int, retention: float) -> TopK:
    """Lay out as many coordinates as fit in the paper's format: a byte for the value and one for its position."""
    return TopK(d, max(1, (math.floor(2 * d * retention) - 2) // 2), positions="index")


def _describe(layout: Layout) -> dict[str, Any]:
    if isinstance(layout, Graded | TopK | ByHead):
        return to_json(layout)
    return {"form": layout.form, **getattr(layout, "about", vars(layout))}
