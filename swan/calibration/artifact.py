"""`calibrate` and its result, `Calibration`: bases of every layer, saved as one safetensors file."""

import dataclasses
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from swan.calibration.bases import Basis, LayerBases, layer_bases
from swan.calibration.batches import (
    POSITIONS,
    beginning,
    check_batch,
    check_batches,
    placed,
    positions_of,
    rows_of,
    tokens_of,
)
from swan.calibration.capture import (
    Observed,
    call,
    config_fingerprint,
    device_of,
    evaluating,
    fingerprint,
    observing,
    tensor_parallel,
    unwrapped,
)
from swan.calibration.checks import check_calibration
from swan.calibration.effects import (
    BUFFER,
    FEW,
    TOKENS,
    WINDOWS,
    Effects,
    LayerGradients,
    effects_of,
    run_backward,
)
from swan.calibration.files import read_tensors, reason_of, write_tensors
from swan.calibration.moments import Moments
from swan.calibration.progress import track
from swan.compiling import outside_autocast, outside_inference_mode
from swan.storage.layout import MAX_DIM

__all__ = ["Calibration", "calibrate"]

# Formats that are read. Only the effects of the newest are of the candidates of effects.py, in codes of now.
FORMATS = tuple(f"swan-calibration-{n}" for n in range(3, 9))
AGAIN = "run swan.calibrate again"
MOMENTS = ("q", "k", "v", "o")

_Values = dict[int, tuple[Tensor, int]]  # moments of the values of each layer, and of how many tokens


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate` for a model: one key and one value basis per layer and KV head.

    Args:
        layers: bases of each layer.
        moments: second moments of each layer, from which other bases can be made.
        basis: name of the basis.
        seed: seed of a random basis.
        fingerprint: fields of the model's configuration, checked by `swan.attach`.
        effects: the effect of packing each layer on the model's predictions, for `Plan.for_retention`; None where it
            was not measured, and after `with_basis`.

    Example:
        >>> import swan
        >>> model = torch.nn.Sequential(swan.SwanAttention(64, heads=4))
        >>> calibration = swan.calibrate(model, [torch.randn(2, 50, 64)])
        >>> calibration
        Calibration(basis='joint', layers=1, tokens=100, effects=False)

    Source: arXiv:2511.18936.
    """

    layers: tuple[LayerBases, ...]
    moments: tuple[Moments, ...]
    basis: Basis
    seed: int
    fingerprint: dict[str, Any]
    effects: Effects | None = None

    @property
    def tokens(self) -> int:
        """Tokens that each layer saw."""
        return self.moments[0].tokens

    @property
    def dims(self) -> list[tuple[int, int]]:
        """Head dimensions of keys and values of each layer."""
        return [(layer.key_basis.shape[-1], layer.value_basis.shape[-1]) for layer in self.layers]

    def with_basis(self, basis: Basis, *, seed: int = 0) -> "Calibration":
        """Return the same measurement with another basis: nothing is run again, and effects are not known there.

        Args:
            basis: ``"joint"``, ``"pca"``, ``"random"`` or ``"identity"``.
            seed: seed of ``"random"``; each layer draws its own.

        Returns:
            Another calibration.

        Raises:
            ValueError: the basis is not known.
        """
        if (basis, seed) == (self.basis, self.seed):
            return self
        return _from_moments(self.moments, basis, seed, self.fingerprint)

    def report(self) -> list[dict[str, float]]:
        """Report the share of importance in the leading quarter and half of the coordinates, a row for each layer."""
        rows = []
        for index, layer in enumerate(self.layers):
            row: dict[str, float] = {"layer": index}
            for name, spectrum in (("keys", layer.key_spectrum), ("values", layer.value_spectrum)):
                captured = spectrum.cumsum(-1).mean(0)
                d = spectrum.shape[-1]
                row[f"{name}_quarter"] = captured[d // 4 - 1].item()
                row[f"{name}_half"] = captured[d // 2 - 1].item()
            rows.append(row)
        return rows

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError where `model` is not of the configuration that was calibrated."""
        self._check(fingerprint(model))

    def check_config(self, config: Any) -> None:
        """Raise ValueError where a configuration of transformers is not the one that was calibrated."""
        self._check(config_fingerprint(config))

    def _check(self, fingerprint: dict[str, Any]) -> None:
        expected, got = self.fingerprint, json.loads(json.dumps(fingerprint))
        differing = [name for name in got if expected.get(name) != got[name]]  # older files have a field more
        if differing:
            listed = ", ".join(f"{n}: {expected.get(n)} calibrated, {got.get(n)} here" for n in differing)
            raise ValueError(f"this calibration is of another model ({listed}); run swan.calibrate on this one")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; an older file is replaced whole or not at all.

        Raises:
            ValueError: `load` would refuse it, or `path` is a folder; then nothing is written.
            OSError: the file cannot be written; then an older one is as it was.
        """
        try:
            check_calibration(self)
        except ValueError as error:
            raise ValueError(f"this calibration is not written to {path}: {error}; {AGAIN}") from error
        tensors = {}
        for i, (layer, moments) in enumerate(zip(self.layers, self.moments, strict=True)):
            for field in dataclasses.fields(layer):
                tensors[f"layers.{i}.{field.name}"] = getattr(layer, field.name).contiguous().cpu()
            for name in MOMENTS:
                tensors[f"layers.{i}.moments.{name}"] = getattr(moments, name).contiguous().cpu()
        if self.effects is not None:
            tensors |= {"effects.keys": self.effects.keys, "effects.values": self.effects.values}
        metadata = {
            "format": FORMATS[-1],
            "basis": self.basis,
            "seed": self.seed,
            "tokens": self.tokens,
            "fingerprint": self.fingerprint,
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a file that `save` wrote.

        Effects in a file of an older version are of other layouts or codes, and left out with a warning.

        Raises:
            ValueError: the file is not a whole calibration, or its tensors are not finite or not orthogonal.
        """
        metadata, tensors = read_tensors(path, FORMATS, "calibration", AGAIN)
        try:
            calibration = cls._from_file(metadata, {name: t.clone() for name, t in tensors.items()})
            check_calibration(calibration)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no whole calibration ({reason_of(error)}); {AGAIN}") from error
        if metadata["format"] != FORMATS[-1] and "effects.keys" in tensors:
            warnings.warn(
                f"{path} was written by an older version of swan, which measured effects of other codes: plans will "
                f"be the same for all layers until you {AGAIN}",
                stacklevel=2,
            )
        return calibration

    @classmethod
    def _from_file(cls, metadata: dict[str, Any], tensors: dict[str, Tensor]) -> "Calibration":
        layers, moments, effects, tokens = [], [], None, metadata["tokens"]
        for i in range(sum(name.endswith(".key_basis") for name in tensors)):
            layers.append(LayerBases(*(tensors.pop(f"layers.{i}.{f.name}") for f in dataclasses.fields(LayerBases))))
            moments.append(Moments(*(tensors.pop(f"layers.{i}.moments.{name}") for name in MOMENTS), tokens=tokens))
        if "effects.keys" in tensors:
            measured = [tensors.pop(f"effects.{side}") for side in ("keys", "values")]
            effects = Effects(*measured) if metadata["format"] == FORMATS[-1] else None
        if tensors:
            raise ValueError(f"unknown tensors, such as {next(iter(tensors))[:40]!r}")
        basis, seed, fingerprint = (metadata[name] for name in ("basis", "seed", "fingerprint"))
        return cls(tuple(layers), tuple(moments), basis, seed, fingerprint, effects)

    def __repr__(self) -> str:
        shown = f"basis={self.basis!r}, layers={len(self.layers)}, tokens={self.tokens}"
        return f"Calibration({shown}, effects={self.effects is not None})"


@outside_inference_mode
@outside_autocast
@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    basis: Basis = "joint",
    *,
    seed: int = 0,
    effects: bool | None = None,
    positions: int | None = None,
    progress: bool = True,
) -> Calibration:
    r"""Run a model over some text; find an orthogonal basis for each layer and KV head, and effects of packing a layer.

    Sums second moments $M_x = \sum_t x_t x_t^\top$ of q, k (after RoPE) and v in float64. The columns of the basis
    ``"joint"`` are the eigenvectors, largest eigenvalue first, of $M_q / \mathrm{tr}\, M_q + M_k / \mathrm{tr}\, M_k$
    for keys, and of the same sum of $M_v$ and $\sum_h W_{O,h}^\top W_{O,h}$ for values. Some 12,000 tokens of ordinary
    text do. Up to 8 windows of 1024 tokens are run backward too, which predicts the KL divergence that each layer adds
    in each of some layouts, in bases of other text where there is four times as much as in the window, since bases fit
    the text that they come from: keys in those of all of it, values in those of some 4000 tokens. These are of batches
    with odd numbers for windows with even ones, and the other way round: let texts of two kinds take turns. One of
    these windows at a time is in memory. `Plan.for_retention` spends bytes accordingly.

    Keys are stored as they are rotated by their positions, so bases have to know those that caches will see. Texts are
    much shorter: each begins at a position of its own, row i of batch n (from 0 on) at the share $u^2$ of the positions
    that are free, where $u$ is $n (\sqrt 5 - 1) / 2 + i \sqrt 2$ without its whole part: half of them in the first
    quarter, since short contexts have those positions, too. Rotary attention does not change by that.

    Args:
        model: a model of your own built from `SwanAttention`, or a transformers decoder.
        batches: inputs of the model: token ids ``[batch, tokens]``, or mappings of keyword
            arguments, such as a tokenizer gives (with an ``attention_mask`` where rows are padded).
        basis: ``"joint"`` (the paper's: queries and keys together, values and output projection together),
            ``"pca"`` (keys and values alone), ``"random"`` or ``"identity"``.
        seed: seed of a random basis, and of the words drawn to measure effects.
        effects: measure effects. By default for transformers models and texts of more than 64 tokens: it takes the
            memory of a backward pass by activations, and a warning says if that fails. True also for a model of your
            own whose output is logits ``[batch, tokens, vocabulary]``.
        positions: over how many positions texts are spread; 1 for none. By default those that a transformers model with
            rotary embeddings knows (``max_position_embeddings``), at most 8192. Batches with ``position_ids`` keep
            theirs, and those with images stay where they are. So do all of a model of your own: give it windows as long
            as your contexts.
        progress: show a progress bar, or lines on stderr where there is no terminal.

    Returns:
        The calibration: give it to `swan.attach`.

    Raises:
        TypeError: the model has no attention that swan knows, or `batches` is a single batch, or a text.
        ValueError: no batch came, or an empty one, or one with ids that the model does not have; activations hold NaN
            or infinity; the model changes its attention scores in a way that swan does not know (softcap, learned
            sinks), or is split over processes; `positions` are more than it knows.

    Example:
        >>> import swan
        >>> model = torch.nn.Sequential(swan.SwanAttention(64, heads=4))
        >>> calibration = swan.calibrate(model, [torch.randn(2, 50, 64)])
        >>> calibration.layers[0].key_basis.shape
        torch.Size([4, 16, 16])

    Source: arXiv:2511.18936.
    """
    check_batches(batches)
    model = unwrapped(model)
    if tensor_parallel(model)[1] > 1:
        raise ValueError(
            "each process holds only some heads of this model; calibrate it in one process, save, and load here"
        )
    identity = fingerprint(model)
    is_transformers = identity["kind"] == "transformers"
    body = cast(nn.Module, model.base_model) if is_transformers else model  # attention is observed, the head is not
    spread = _positions(model, positions, is_transformers)
    moments: dict[int, Moments] = {}
    halves: tuple[_Values, _Values] = {}, {}  # of batches with even numbers, and of those with odd ones
    measures_effects = effects or (effects is None and is_transformers)
    sample, rng, count = [], random.Random(seed), 0  # the sample is run again, backward too

    def observe(index: int, observed: Observed) -> None:
        if index not in moments:
            if (d := max(observed.k.shape[3], observed.v.shape[3])) > MAX_DIM:
                raise ValueError(
                    f"layer {index} has heads of {d} dimensions, swan stores up to {MAX_DIM}: not supported"
                )
            moments[index] = Moments.begin(observed.q, observed.k, observed.v, observed.module)
        layer, half = moments[index], halves[count % 2]
        some, tokens = half.get(index, (0, 0))
        before = (layer.v.clone(), layer.tokens) if measures_effects and tokens < FEW * TOKENS else None
        layer.add(observed.q, observed.k, observed.v, observed.real)
        if before is not None:
            half[index] = some + layer.v - before[0], tokens + layer.tokens - before[1]

    with evaluating(model):
        for batch in track(batches, "calibrating", show=progress):
            check_batch(batch, model if is_transformers else None)
            if is_transformers:
                batch = placed(batch, count, spread)
            with observing(model, observe):
                call(body, batch)
            if measures_effects and count < WINDOWS:
                sample.append((count, batch))
            elif measures_effects and (place := rng.randrange(count + 1)) < WINDOWS:  # all batches are equally likely
                sample[place] = count, batch
            count += 1
    if count == 0:
        raise ValueError("no batch came; give calibrate at least one")
    if not moments:
        raise TypeError(f"{type(model).__name__} has no attention that swan knows: none was observed")
    ordered = {index: moments[index] for index in sorted(moments)}
    for row, layer in enumerate(ordered.values()):
        layer.check(f"layer {row}")
    calibration = _from_moments(tuple(ordered.values()), basis, seed, json.loads(json.dumps(identity)))
    if not sample:
        return calibration
    if max(tokens_of(batch) for _, batch in sample) <= BUFFER:
        if effects:
            raise ValueError(
                f"effects are measured on tokens beyond the buffer: give texts of more than {BUFFER} tokens"
            )
        return calibration
    try:
        with evaluating(model):
            measured = _measure(model, sample, halves, list(ordered), calibration, progress)
    except RuntimeError as error:
        if effects:
            raise
        warnings.warn(f"plans will be the same for all layers, their effects were not measured: {error}", stacklevel=2)
        return calibration
    return dataclasses.replace(calibration, effects=measured)


def _positions(model: nn.Module, positions: int | None, is_transformers: bool) -> int:
    """Return over how many positions texts are spread.

    Raises:
        ValueError: fewer than 1 are asked for, or more than the model knows.
    """
    known = positions_of(model) if is_transformers else 1
    if positions is None:
        return min(known, POSITIONS)
    if not 1 <= positions <= known:
        if known == 1:
            raise ValueError(
                "texts are spread over positions in transformers models with rotary embeddings and a number of "
                f"positions, this is none; leave positions out, got {positions}"
            )
        raise ValueError(f"positions must be from 1 to the {known} of this model, got {positions}")
    return positions


def _measure(
    model: nn.Module,
    sample: Sequence[tuple[int, Any]],
    halves: tuple[_Values, _Values],
    indices: Sequence[int],
    calibration: Calibration,
    progress: bool,
) -> Effects:
    """Measure effects on the beginning of each batch, one at a time.

    Args:
        model: in evaluation mode.
        sample: batches, and which of all they are, from 0 on.
        halves: moments of values of batches with even numbers, and of those with odd ones.
        indices: of the layers.
        calibration: of the model.
        progress: show a progress bar.
    """
    generator = torch.Generator().manual_seed(calibration.seed)
    windows = [(number, beginning(batch, TOKENS)) for number, batch in sample]
    tokens = sum(rows_of(window) * tokens_of(window) for _, window in windows)

    def texts() -> Iterator[tuple[dict[int, LayerGradients], dict[int, tuple[Tensor, Tensor]]]]:
        for number, window in track(windows, "measuring effects", show=progress):
            layers, bases = run_backward(model, window, generator), {}
            others = halves[1 - number % 2]
            for index in layers:
                own, (v, count) = layers[index].moments, others.get(index, (None, 0))
                v = v if count >= FEW * own.tokens else None
                bases[index] = _bases(calibration, indices.index(index), own, v)
            yield layers, bases
            del layers, bases  # before the next ones are there

    kv_heads = {i: layer.key_basis.shape[0] for i, layer in zip(indices, calibration.layers, strict=True)}
    return effects_of(texts(), kv_heads, tokens, device_of(model))


def _bases(calibration: Calibration, row: int, own: Moments, v: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return bases of a layer by other text: all of it, but for values that of moments `v`, if there are any.

    What a basis prunes seems less on text that it was fitted to, and on text of the same kind. Values show that most
    where a basis comes from much text; keys have to be known at many positions.
    """
    layer, moments = calibration.layers[row], calibration.moments[row]
    if moments.tokens - own.tokens < FEW * own.tokens:
        return layer.key_basis, layer.value_basis
    others = moments.without(own)
    if v is not None:
        others = dataclasses.replace(others, v=v)
    key_basis, value_basis, *_ = layer_bases(others, calibration.basis, seed=calibration.seed + 2 * row)
    return key_basis.float(), value_basis.float()


def _from_moments(moments: tuple[Moments, ...], basis: Basis, seed: int, fingerprint: dict[str, Any]) -> Calibration:
    layers = []
    for i, layer in enumerate(moments):
        tensors = layer_bases(layer, basis, seed=seed + 2 * i)
        layers.append(LayerBases(*(t.float().cpu() for t in tensors)))
    return Calibration(tuple(layers), moments, basis, seed, fingerprint)
