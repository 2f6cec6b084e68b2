"""The mistakes of tests/mutants.py: small edits of one place each, and the test files that should notice."""

from typing import NamedTuple

__all__ = ["MUTANTS", "Mutant"]


class Mutant(NamedTuple):
    """A mistake.

    Attributes:
        name: what is wrong with it, in a few words joined by dashes.
        file: the file that is edited.
        old: text that the file has exactly once.
        new: what replaces it.
        tests: files (or tests in them) under tests/, the likeliest first.
        equivalent: where no test can notice it, why; else empty.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""


ATTENTION, DENSE = "swan/functional/attention.py", "swan/functional/dense.py"
COMPILING, DISPATCH = "swan/compiling.py", "swan/functional/dispatch.py"
PRUNING, ROTATION = "swan/functional/pruning.py", "swan/functional/rotation.py"
CODES, GRADED, LAYOUT = "swan/storage/codes.py", "swan/storage/graded.py", "swan/storage/layout.py"
MIXING, PACKED, TOPK = "swan/storage/mixing.py", "swan/storage/packed.py", "swan/storage/topk.py"
BUFFER, CACHE, CHECKS = "swan/modules/buffer.py", "swan/modules/cache.py", "swan/modules/checks.py"
FORECAST, HISTORY = "swan/modules/forecast.py", "swan/modules/history.py"
KERNELS, CUDA = "swan/kernels/__init__.py", "swan/kernels/cuda/"
STATE, VISIBLE = "swan/modules/state.py", "swan/modules/visible.py"
ATTACH, BUDGET = "swan/integrations/transformers/attach.py", "swan/integrations/transformers/budget.py"
HF_ATTENTION, HF_CACHE = "swan/integrations/transformers/attention.py", "swan/integrations/transformers/cache.py"
KEYWORD, LAYERS = "swan/integrations/transformers/keyword.py", "swan/integrations/transformers/layers.py"
LEVELS, SAVING = "swan/integrations/transformers/levels.py", "swan/integrations/transformers/saving.py"

BATCHES = "swan/calibration/batches.py"
CAPTURE, GENERATION = "swan/calibration/capture.py", "swan/integrations/transformers/generation.py"
TRIAL = "swan/integrations/transformers/trial.py"

OF_MASKS, OF_IMAGES, OF_NAN = ("cases/test_masks.py",), ("cases/test_images.py",), ("cases/test_nan.py",)
OF_ATTENTION = ("functional/test_attention.py",)
OF_ROTATION = ("functional/test_rotation.py",)
OF_STORAGE = ("storage/test_graded.py", "storage/test_packed.py")
OF_CACHE = ("modules/test_cache.py", "modules/test_crop_and_rows.py")
OF_CROP = ("modules/test_crop_and_rows.py", "modules/test_buffer.py")
OF_REPACK, OF_REFUSALS = ("modules/test_repack.py",), ("modules/test_cache_refusals.py",)
OF_EVICT, OF_BYTES, OF_STATE = ("modules/test_evict.py",), ("modules/test_cache_bytes.py",), ("modules/test_state.py",)
OF_PADDED_PROMPTS = ("integrations/test_generation.py::test_chunks_do_not_matter",)
OF_FULL_BUDGET = ("integrations/test_full_budget.py",)
OF_SLIDING_BUDGET = ("integrations/test_budget.py::test_a_sliding_layer_counts_as_what_it_holds",)
OF_CROPPED_BUDGET = ("integrations/test_budget.py::test_a_cropped_layer_still_holds_its_memory",)
OF_HF_CACHE, OF_FILE = ("integrations/test_cache.py",), ("integrations/test_cache_file.py",)
OF_ATTACH, OF_KEYWORD = ("integrations/test_attach.py",), ("integrations/test_keyword.py",)
OF_ONE_CALL = ("kernels/test_attend_cpu.py::test_what_does_not_fit_one_call_is_merged",)
OF_NUMBERS = ("kernels/test_attend_cpu.py::test_tokens_seen_as_numbers",)
OF_CUDA_HOST = ("kernels/test_cuda_host.py",)
OF_CUDA_PAGES = ("kernels/test_attend_pages_cuda.py::test_pages_of_any_number_of_tokens",)
OF_SLOTS = ("kernels/test_attend_pages_cuda.py::test_tokens_go_to_their_slots_and_nothing_else_changes",)
OF_ONE_TILE = ("test_never_dense.py::test_steps_stay_within_a_tile[compiled-dynamic-decode-few bits]",)
BY_HEAD, OF_BY_HEAD = "swan/storage/by_head.py", ("storage/test_by_head.py",)
OF_CUDA_HEADS = ("kernels/test_cuda_host.py::test_a_cache_whose_heads_differ",)
OF_KEEPING = ("modules/test_keeping.py",)
OF_NUMERICS = ("functional/test_numerics.py",)
OF_BASES = ("calibration/test_effects.py::test_bases_are_those_of_other_text_where_there_is_enough",)
OF_POSITIONS = ("calibration/test_moments.py",)
OF_MODES, OF_DEVICES = ("test_modes.py",), ("integrations/test_devices.py",)
OF_PAGES, OF_SERVERS = ("integrations/test_vllm_pages.py",), ("integrations/test_vllm_settings.py",)
PAGES, SERVED = "swan/integrations/vllm/pages.py", "swan/integrations/vllm/layer.py"
PAGED, PLANNED = "swan/integrations/vllm/attention.py", "swan/integrations/vllm/capacity.py"

MUTANTS = [
    # attention ------------------------------------------------------------------------------------
    Mutant(
        "causal-mask-one-off",
        DENSE,
        "ones.tril(tokens - queries)",
        "ones.tril(tokens - queries - 1)",
        OF_ATTENTION,
    ),
    Mutant(
        "scale-of-the-wrong-dimension",
        ATTENTION,
        "float(q.shape[-1]) ** -0.5 if scale",
        "float(q.shape[-2]) ** -0.5 if scale",
        OF_ATTENTION,
    ),
    Mutant(
        "scale-lost-in-tiles",
        ATTENTION,
        "mask=tile_mask, scale=scale, impl=impl",
        "mask=tile_mask, impl=impl",
        OF_ATTENTION,
    ),
    Mutant(
        "scale-lost-in-the-kernel",
        ATTENTION,
        "history_mask, _factor(q, scale)",
        "history_mask, _factor(q, None)",
        OF_ATTENTION,
    ),
    Mutant(
        "mask-of-the-first-tile-for-all",
        ATTENTION,
        "mask[..., start:stop]",
        "mask[..., : stop - start]",
        OF_ATTENTION,
    ),
    Mutant("tile-of-everything", ATTENTION, "TILE = 1024 ", "TILE = 10**9 ", OF_ONE_TILE),
    Mutant(
        "merge-of-nothing-with-nothing",
        ATTENTION,
        "torch.where(lse == -math.inf, 0, (lses - lse).exp())",
        "(lses - lse).exp()",
        OF_ATTENTION,
    ),
    Mutant("merge-by-the-largest", ATTENTION, "torch.logsumexp(lses, dim=0)", "lses.amax(dim=0)", OF_ATTENTION),
    Mutant(
        "query-heads-of-another-kv-head",
        DENSE,
        '"b (h g) q d -> b h (g q) d"',
        '"b (g h) q d -> b h (g q) d"',
        OF_ATTENTION,
    ),
    Mutant(
        "masks-of-another-head",
        DENSE,
        '"b (h g) q k -> b h (g q) k"',
        '"b (g h) q k -> b h (g q) k"',
        OF_ATTENTION,
    ),
    Mutant(
        "blind-rows-are-not-zero",
        DENSE,
        "out if mask is None else torch.where(mask.any(-1, keepdim=True), out, 0)",
        "out",
        OF_ATTENTION,
    ),
    Mutant(
        "blind-rows-count-in-merges",
        DENSE,
        "lse = torch.where(mask.any(-1), lse, -math.inf)",
        "lse = torch.where(mask.any(-1), lse, 0)",
        OF_ATTENTION,
    ),
    Mutant("coordinates-are-taken-side-by-side", DENSE, "if x.stride(-1) == 1 else", "if True else", OF_ATTENTION),
    Mutant("autocast-stays-on", COMPILING, "if torch.is_autocast_enabled(device)", "if False", OF_MODES),
    Mutant("a-matrix-without-numbers-is-kept", MIXING, "if type(matrix) is Tensor", "if True", OF_MODES),
    Mutant("counters-are-made-anywhere", "swan/kernels/calls.py", ', device="cpu") for n', ") for n", OF_DEVICES),
    Mutant("padding-is-the-callers", BUFFER, "torch.long, copy=True)", "torch.long)", OF_CACHE),
    Mutant("value-mix-not-transposed", ATTENTION, "value_mix.mT.to", "value_mix.to", OF_STORAGE),
    Mutant(
        "mixes-of-keys-and-values-swapped",
        ATTENTION,
        "tokens, key_mix, value_mix = k.shape[2], mixing(k), mixing(v)",
        "tokens, value_mix, key_mix = k.shape[2], mixing(k), mixing(v)",
        OF_STORAGE,
    ),
    Mutant(
        "scores-in-half-precision",
        DENSE,
        "_group_rows(q, kv_heads).float(), k.float(),",
        "_group_rows(q, kv_heads), k,",
        OF_ATTENTION,
    ),
    Mutant(
        "recent-tokens-without-their-mask",
        ATTENTION,
        "Recent(k_buffer, v_buffer, buffer_mask)",
        "Recent(k_buffer, v_buffer, None)",
        OF_ATTENTION,
    ),
    # dispatch: what is wrong is slow, not false ---------------------------------------------------------
    Mutant(
        "auto-attends-by-tensor-code",
        DISPATCH,
        "return kernels.IMPL if kernels.built(q.device) else impl",
        "return impl",
        ("functional/test_dispatch.py",),
    ),
    Mutant(
        "auto-packs-by-tensor-code",
        DISPATCH,
        'return kernels.IMPL if kernels.built(x.device) else "compiled"',
        'return "compiled"',
        ("functional/test_dispatch.py",),
    ),
    Mutant(
        "kernel-for-many-queries",
        DISPATCH,
        "kernels is None or rows > kernels.MOST_ROWS",
        "kernels is None",
        ("functional/test_dispatch.py",),
    ),
    Mutant(
        "two-calls-where-one-serves",
        DISPATCH,
        "return keys_fit and values_fit and k_tokens == v_tokens",
        "return False",
        OF_ONE_CALL,
    ),
    # rotation and pruning ---------------------------------------------------------------------------
    Mutant(
        "rotation-is-its-inverse",
        ROTATION,
        "basis.mT if inverse else basis",
        "basis if inverse else basis.mT",
        OF_ROTATION,
    ),
    Mutant("fold-of-the-inverse", ROTATION, '"o h g d, h d e -> o h g e"', '"o h g d, h e d -> o h g e"', OF_ROTATION),
    Mutant("rotations-not-uniform", ROTATION, "(q * signs[:, None, :])", "q", OF_ROTATION),
    Mutant("any-basis-is-orthogonal", ROTATION, "tolerance = 8 *", "tolerance = 10**5 *", OF_ROTATION),
    Mutant("signed-largest", PRUNING, "x.abs().topk", "x.topk", ("functional/test_pruning.py",)),
    # storage ----------------------------------------------------------------------------------------
    Mutant(
        "codes-not-clamped",
        CODES,
        "((part * half).floor() + half).clamp(0, 2 * half - 1)",
        "((part * half).floor() + half)",
        OF_STORAGE,
    ),
    Mutant("codes-of-the-wrong-steps", CODES, "(part * half).floor()", "(part * half).round()", OF_STORAGE),
    Mutant("two-bits-clipped-elsewhere", CODES, "2: 2.2", "2: 1.9", OF_STORAGE),
    Mutant("codes-longer-than-vectors", CODES, "* EIGHTH**-0.5).nan", ").nan", OF_STORAGE),
    Mutant("clipped-beyond-the-peak", CODES, "(clip > 0) & (clip < 1)", "clip > 0", OF_STORAGE),
    Mutant("scales-past-the-largest", CODES, "nearest.clamp(max=NOT_A_NUMBER - 1)", "nearest", OF_NUMERICS),
    Mutant(
        "clipped-at-mean-squares",
        "swan/kernels/cpu/pack.cpp",
        "std::sqrt(square / size)",
        "(square / size)",
        ("kernels/test_pack_cpu.py",),
    ),
    Mutant(
        "scales-of-clipped-codes-are-peaks",
        CUDA + "codes.cuh",
        "if (!clip || byte == NOT_A_NUMBER) return byte;",
        "return byte;",
        ("kernels/test_pack_cuda.py",),
    ),
    Mutant("scales-below-the-peak", CODES, "* OCTAVE).ceil()", "* OCTAVE).round()", OF_STORAGE),
    Mutant("low-bits-first", CODES, "3: (2, 1)", "3: (1, 2)", OF_STORAGE),
    Mutant(
        "coordinates-side-by-side",
        CODES,
        '"... (byte slot) -> ... byte slot"',
        '"... (slot byte) -> ... byte slot"',
        OF_STORAGE,
    ),
    Mutant("integers-rounded-down", CODES, "multiples.round()", "multiples.floor()", OF_STORAGE),
    Mutant(
        "scales-overflow",
        CODES,
        "(peak / 127).clamp(max=largest / 128)",
        "(peak / 127)",
        OF_STORAGE,
    ),
    Mutant("halves-rounded-up", CODES, "bits + 0x7FFF + ((bits >> 16) & 1)", "bits + 0x8000", OF_STORAGE),
    Mutant(
        "scale-of-the-first-group-for-all",
        GRADED,
        "byte, scale = byte + width, scale + 1",
        "byte, scale = byte + width, scale",
        OF_STORAGE,
    ),
    Mutant("groups-of-16-bits-at-the-first", GRADED, "value += size", "value += 0", OF_STORAGE),
    Mutant(
        "tokens-unmixed-when-packed",
        GRADED,
        "else x @ matrix\n        codes",
        "else x @ matrix.mT\n        codes",
        OF_STORAGE,
    ),
    Mutant("retention-without-scales", GRADED, "self.row_bytes + scales + whole", "self.row_bytes + whole", OF_STORAGE),
    Mutant(
        "retention-of-keys-twice",
        LAYOUT,
        "vectors * self.values.d * itemsize",
        "vectors * self.keys.d * itemsize",
        OF_STORAGE,
    ),
    Mutant("another-hadamard", MIXING, "torch.kron(butterfly, matrix)", "torch.kron(matrix, butterfly)", OF_STORAGE),
    Mutant(
        "pieces-of-other-tokens",
        PACKED,
        "self.positions[:, :, start:stop]",
        "self.positions[:, :, : stop - start]",
        OF_STORAGE,
    ),
    Mutant("unpacked-with-the-mix", PACKED, "values @ matrix.mT", "values @ matrix", OF_STORAGE),
    Mutant("positions-out-of-order", TOPK, ".indices.sort(dim=-1).values", ".indices", OF_STORAGE),
    Mutant(
        "bits-from-the-other-end",
        TOPK,
        "weights = 1 << torch.arange(8,",
        "weights = 128 >> torch.arange(8,",
        OF_STORAGE,
    ),
    Mutant("ranks-one-byte-on", TOPK, "count.cumsum(-1) - count", "count.cumsum(-1)", OF_STORAGE),
    Mutant("integers-without-their-scale", TOPK, "self.keep + SCALE_DTYPE.itemsize", "self.keep", OF_STORAGE),
    # modules: buffer and history ------------------------------------------------------------------
    Mutant(
        "ring-one-slot-off", BUFFER, "slots = (slots + length) % size", "slots = (slots + length + 1) % size", OF_CACHE
    ),
    Mutant(
        "ring-of-a-long-chunk-off",
        BUFFER,
        "(slots + length + tokens) % size",
        "(slots + length + tokens - 1) % size",
        OF_CACHE,
    ),
    Mutant("sinks-of-late-rows-not-written", BUFFER, "< self.state.padded + self.sinks", "< self.sinks", OF_CACHE),
    Mutant(
        "sinks-are-the-padding",
        BUFFER,
        "sinks = offsets if state.padding is None else state.padding[:, None] + offsets",
        "sinks = offsets",
        OF_CACHE,
    ),
    Mutant(
        "sinks-counted-in-the-ring-too",
        BUFFER,
        "torch.where(sinks < state.first, sinks, NOWHERE)",
        "torch.where(sinks < state.length, sinks, NOWHERE)",
        OF_CACHE,
    ),
    Mutant(
        "the-oldest-in-the-ring-forgets-a-crop",
        BUFFER,
        "max(int(state.first), state.length - self.size)",
        "max(0, state.length - self.size)",
        OF_CROP,
    ),
    Mutant(
        "crop-forgets-the-oldest-in-the-ring",
        BUFFER,
        "state.length, state.first = length, min(int(state.first), length)",
        "state.length = length",
        OF_CROP,
    ),
    Mutant("static-crop-forgets-the-oldest-in-the-ring", BUFFER, "state.first.clamp_(max=length)", "pass", OF_CROP),
    Mutant("the-ring-is-taken-whole", BUFFER, "min(max(needed, 2 * slots, FEWEST), self.size)", "self.size", OF_BYTES),
    Mutant("the-forecast-forgets-that-the-ring-grows", FORECAST, "slots_after(tokens)", "slots_after(0)", OF_BYTES),
    Mutant(
        "a-saved-ring-that-was-full-may-be-short",
        CHECKS,
        "if first or not length <= slots <= size:",
        "if not length <= slots <= size:",
        OF_STATE,
    ),
    Mutant("static-crop-keeps-the-padding", BUFFER, "state.padding.zero_()", "pass", OF_CROP),
    Mutant(
        "slots-that-held-nothing-are-packed",
        BUFFER,
        "(column >= state.first) & (column >= self.sinks)",
        "column >= self.sinks",
        OF_CROP,
    ),
    Mutant(
        "no-token-over-token-0", HISTORY, "torch.where(places < 0, self.room, places)", "places.clamp(min=0)", OF_CACHE
    ),
    Mutant(
        "dropped-tokens-are-written",
        HISTORY,
        "range(skipped, tokens, TILE)",
        "range(0, tokens, TILE)",
        OF_EVICT,
    ),
    Mutant(
        "a-history-that-grows-begins-anew",
        HISTORY,
        "state.k_history = _resized(state.k_history, capacity)",
        "state.k_history = _resized(state.k_history.tokens(0, 0), capacity)",
        OF_CACHE,
    ),
    Mutant(
        "kernel-packs-empty-slots",
        CACHE,
        "(length, first), state.padding, buffer.sinks",
        "(length, 0), state.padding, buffer.sinks",
        ("kernels/test_pack_cpu.py",),
    ),
    Mutant(
        "kernel-puts-sinks-at-the-padding",
        CACHE,
        "(length, first), state.padding, buffer.sinks",
        "(length, first), None, buffer.sinks",
        OF_CACHE,
    ),
    Mutant(
        "evict-keeps-the-oldest",
        HISTORY,
        "start = stored - remaining",
        "start, stored = 0, remaining",
        OF_EVICT,
    ),
    Mutant(
        "history-begins-at-what-was-dropped",
        HISTORY,
        "return self.sinks + self.state.dropped",
        "return self.sinks",
        OF_EVICT,
    ),
    Mutant(
        "values-repacked-as-keys",
        HISTORY,
        "_repacked(state.v_history, plan_layer.values, stored)",
        "_repacked(state.v_history, plan_layer.keys, stored)",
        OF_REPACK,
    ),
    Mutant(
        "tiles-repacked-over-the-first",
        HISTORY,
        "_put(new, tile, start)",
        "_put(new, tile, 0)",
        OF_REPACK,
    ),
    Mutant("a-growing-history-has-no-room-ahead", HISTORY, "max(BLOCK, tokens // 32)", "tokens // 32", OF_BYTES),
    # modules: what queries see --------------------------------------------------------------------
    Mutant("seen-packed-and-dense", HISTORY, "stop = column - self.start", "stop = column - self.start + 1", OF_CACHE),
    Mutant(
        "a-chunk-sees-packed-what-is-dense",
        VISIBLE,
        "steps = queries - 1 if windowed else 0",
        "steps = queries - 1",
        OF_CACHE,
    ),
    Mutant("padding-of-a-prompt-is-seen", CACHE, "padding is None and state.is_empty()", "state.is_empty()", OF_CACHE),
    Mutant(
        "blocks-of-a-chunk-forget-sinks-in-it",
        VISIBLE,
        "min(old + max(padding + visible.sinks - first, 0), stop)",
        "min(old, stop)",
        OF_CACHE,
    ),
    Mutant(
        "blocks-of-a-chunk-see-all-before-them",
        VISIBLE,
        "slice(max(old + begin - first, head), stop)",
        "slice(head, stop)",
        OF_CACHE,
    ),
    Mutant(
        "blocks-of-a-chunk-begin-one-late",
        VISIBLE,
        "first_query=first + queries.start",
        "first_query=first + queries.start + 1",
        OF_CACHE,
    ),
    Mutant("window-one-short", VISIBLE, "(key >= window)", "(key > window)", OF_CACHE),
    Mutant(
        "history-one-too-long",
        VISIBLE,
        "end = None if isinstance(self.window, int) else self.window",
        "end = None if isinstance(self.window, int) else self.window + 1",
        OF_CACHE,
    ),
    Mutant(
        "sinks-of-padded-rows-seen-twice",
        VISIBLE,
        "first = None if self.padding is None else self.padding + self.sinks",
        "first = self.padding",
        OF_CACHE,
    ),
    Mutant(
        "history-mask-ignores-padding",
        VISIBLE,
        "first = None if self.padding is None else self.padding + self.sinks",
        "first = None",
        OF_CACHE,
    ),
    Mutant("dense-mask-ignores-padding", VISIBLE, "(key <= last) & (key >= padding)", "(key <= last)", OF_CACHE),
    Mutant("every-mask-is-causal", VISIBLE, "first = 0 if mask is None else self.queries - 1", "first = 0", OF_MASKS),
    Mutant(
        "empty-slots-are-seen-by-a-mask",
        VISIBLE,
        "(key <= last) & ",
        "((key <= last) | (mask is not None)) & ",
        OF_MASKS,
    ),
    Mutant(
        "ring-full-before-the-sinks-left",
        VISIBLE,
        "filled == buffer.size and state.first >= buffer.sinks",
        "filled == buffer.size",
        OF_CACHE,
    ),
    Mutant(
        "columns-of-a-full-ring-off",
        VISIBLE,
        "ring_columns(self.first_query, tokens",
        "ring_columns(self.first_query - 1, tokens",
        OF_CACHE,
    ),
    Mutant("a-window-before-the-first-token", VISIBLE, "return max(start, int(first))", "return start", OF_CACHE),
    Mutant("static-window-forgets-a-crop", VISIBLE, "else torch.maximum(start, first)", "else start", OF_CROP),
    # modules: state, checks, forecast -------------------------------------------------------------
    Mutant(
        "state-dict-without-what-was-dropped",
        STATE,
        '("length", "first", "padded", "dropped")',
        '("length", "first", "padded")',
        OF_STATE,
    ),
    Mutant(
        "state-dict-without-the-most-padding",
        STATE,
        '("length", "first", "padded", "dropped")',
        '("length", "first", "dropped")',
        OF_STATE,
    ),
    Mutant("state-dict-with-the-room-ahead", STATE, "packed = history.tokens(0, stored)", "packed = history", OF_STATE),
    Mutant("a-loaded-state-is-shared", STATE, "t.clone() for name, t", "t for name, t", OF_STATE),
    Mutant(
        "half-converts-scales", STATE, "(None if t is None else moved(t)", "(None if t is None else fn(t)", OF_STATE
    ),
    Mutant(
        "counters-before-are-those-after",
        STATE,
        "return length.clone(), first.clone()",
        "return length, first",
        OF_CACHE,
    ),
    Mutant(
        "crop-keeps-what-was-dropped",
        CACHE,
        "= min(self.state.dropped, self._columns_left()) + owed",
        "= self.state.dropped",
        OF_EVICT,
    ),
    Mutant(
        "crop-forgives-an-owed-eviction",
        CACHE,
        "min(self.state.dropped, self._columns_left()) + owed",
        "min(self.state.dropped, self._columns_left())",
        OF_EVICT,
    ),
    Mutant(
        "queries-checked-too-late",
        CACHE,
        "            check_attention(q, k, v, None)\n",
        "",
        OF_REFUSALS,
    ),
    Mutant(
        "stale-visible-accepted",
        CHECKS,
        "first_query + visible.queries != length",
        "first_query + visible.queries > length",
        OF_REFUSALS,
    ),
    Mutant(
        "one-token-too-many-fits",
        CHECKS,
        "if length + tokens > max_length",
        "if length + tokens > max_length + 1",
        OF_REFUSALS,
    ),
    Mutant("a-mask-may-be-one-short", CHECKS, "mask.shape[3] < length", "mask.shape[3] < length - 1", OF_REFUSALS),
    Mutant("a-full-history-is-thought-to-grow", FORECAST, "if stored > capacity", "if stored >= capacity", OF_BYTES),
    Mutant(
        "room-after-a-drop-is-of-all-tokens",
        FORECAST,
        "min(capacity, grown(history_after(cache, 0, drop)))",
        "min(capacity, grown(stored))",
        OF_BYTES,
    ),
    # transformers ---------------------------------------------------------------------------------
    Mutant(
        "a-row-begins-with-each-chunk",
        HF_ATTENTION,
        "torch.where(earlier < length, earlier, length + before)",
        "length + before",
        OF_PADDED_PROMPTS,
    ),
    Mutant(
        "a-chunk-of-padding-is-no-padding",
        HF_ATTENTION,
        "torch.where(new.any(-1), new.int().argmax(-1), queries)",
        "new.int().argmax(-1)",
        OF_PADDED_PROMPTS,
    ),
    Mutant(
        "padding-known-when-one-row-has-begun",
        HF_ATTENTION,
        "(earlier < length).all()",
        "(earlier < length).any()",
        OF_PADDED_PROMPTS,
    ),
    Mutant(
        "what-moves-exists-once", BUDGET, "return sum(pieces) + max(pieces)", "return sum(pieces)", OF_SLIDING_BUDGET
    ),
    Mutant(
        "the-last-tokens-are-never-dropped",
        BUDGET,
        "range(BLOCK, history + BLOCK, BLOCK)",
        "range(BLOCK, history, BLOCK)",
        OF_FULL_BUDGET,
    ),
    Mutant("dropped-but-not-lowered", BUDGET, "        cache.move_to(least)", "        pass", OF_FULL_BUDGET),
    Mutant(
        "cropped-memory-is-free",
        BUDGET,
        "return max(now, stored * rows * vector_bytes)",
        "return stored * rows * vector_bytes",
        OF_CROPPED_BUDGET,
    ),
    Mutant(
        "a-sliding-layer-keeps-one-less",
        BUDGET,
        "min(stored, layer.sliding_window - 1)",
        "min(stored, layer.sliding_window - 2)",
        OF_SLIDING_BUDGET,
    ),
    Mutant(
        "a-sliding-layer-keeps-one-more",
        BUDGET,
        "min(stored, layer.sliding_window - 1)",
        "min(stored, layer.sliding_window)",
        OF_SLIDING_BUDGET,
    ),
    Mutant(
        "a-window-into-all-tokens",
        HF_CACHE,
        "layer.keys, layer.values = layer.keys.clone(), layer.values.clone()",
        "pass",
        OF_SLIDING_BUDGET,
    ),
    Mutant(
        "excluded-layers-compete",
        LEVELS,
        "torch.tensor(self.excluded, dtype",
        "torch.tensor([], dtype",
        OF_HF_CACHE,
    ),
    Mutant("excluded-layers-count", LEVELS, "None if row in self.excluded else layer", "layer", OF_HF_CACHE),
    Mutant("crop-by-nothing-forgets-all", LAYERS, "if tokens_to_remove <= 0", "if tokens_to_remove < 0", OF_HF_CACHE),
    Mutant(
        "saved-at-its-highest-level",
        SAVING,
        "(cache.plan, *cache.dial.levels)",
        "(cache.dial.levels[0], *cache.dial.levels)",
        OF_FILE,
    ),
    Mutant(
        "a-loaded-budget-warns-again",
        SAVING,
        "[budget.nbytes, budget.on_full, budget.warned]",
        "[budget.nbytes, budget.on_full]",
        OF_FILE,
    ),
    Mutant(
        "detach-leaves-the-value-basis",
        ATTACH,
        "del layer.swan_key_basis, layer.swan_value_basis",
        "del layer.swan_key_basis",
        OF_ATTACH,
    ),
    Mutant("detach-leaves-generate", ATTACH, '("generate", "prepare', '("prepare', OF_KEYWORD),
    Mutant("attach-does-not-look-at-states", TRIAL, "> OF_HIDDEN_STATES", "> torch.inf", OF_ATTACH),
    Mutant("attach-does-not-look-at-attention", TRIAL, "> OF_ATTENTION", "> torch.inf", OF_ATTACH),
    Mutant(
        "a-cache-belongs-to-every-model", HF_ATTENTION, "if key.bases != module.swan_bases:", "if False:", OF_ATTACH
    ),
    Mutant("padding-is-what-the-last-query-misses", HF_ATTENTION, "mask.any((1, 2))", "mask[:, 0, -1]", OF_MASKS),
    Mutant("a-cache-is-left-behind", GENERATION, "inputs[name] = cache", "pass", ("cases/test_longrope.py",)),
    Mutant("a-cache-is-filled-twice", GENERATION, "cache.reset()", "pass", ("cases/test_longrope.py",)),
    Mutant(
        "the-tower-observes-too",
        CAPTURE,
        "part, implementation = decoder(model)",
        "part, implementation = model",
        OF_IMAGES,
    ),
    Mutant("a-wide-window-hides", CAPTURE, "window < positions", "window > 0", ("cases/test_wide_windows.py",)),
    Mutant("a-bias-is-a-mask", CAPTURE, "if bool(((mask != 0) & seen).any()):", "if False:", OF_MASKS),
    Mutant("detach-leaves-its-hooks", ATTACH, "hook.remove()", "pass", OF_KEYWORD),
    Mutant(
        "a-refused-model-stays-attached",
        ATTACH,
        "        detach(model)\n        raise",
        "        raise",
        OF_ATTACH,
    ),
    Mutant(
        "no-cache-may-be-given-beside-one",
        KEYWORD,
        'kwargs.get("past_key_values") is not None',
        '"past_key_values" in kwargs',
        OF_KEYWORD,
    ),
    Mutant(
        "only-the-model-with-its-head-takes-a-cache",
        KEYWORD,
        "dict.fromkeys((model, cast(nn.Module, model.base_model)))",
        "[model]",
        OF_KEYWORD,
    ),
    # kernels --------------------------------------------------------------------------------------
    Mutant("end-is-seen", KERNELS, "columns < self.end.view", "columns <= self.end.view", OF_NUMBERS),
    Mutant("start-forgotten", KERNELS, "device=bounds[0].device) + self.start", "device=bounds[0].device)", OF_NUMBERS),
    Mutant(
        "read-past-the-memory",
        CUDA + "layouts.py",
        "if inside and aligned and",
        "if aligned and",
        OF_CUDA_HOST,
    ),
    Mutant(
        "counters-too-few",
        CUDA + "device.py",
        "found is None or len(found) < count",
        "found is None",
        OF_CUDA_HOST,
    ),
    Mutant(
        "end-of-one-query-for-all",
        CUDA + "attend.py",
        "0 if end is None or len(end) == 1 else end.stride(0)",
        "0",
        OF_CUDA_HOST,
    ),
    Mutant(
        "recent-tokens-are-no-part",
        CUDA + "attend.py",
        "parts = splits + (beside > 0)",
        "parts = splits",
        OF_CUDA_HOST,
    ),
    Mutant(
        "slots-of-sinks-in-the-ring", CUDA + "pack.py", "k_recent.shape[2] - sinks,", "k_recent.shape[2],", OF_CUDA_HOST
    ),
    Mutant(
        "unpacked-as-keys", CUDA + "pack.py", "*_plane(out), tokens, values)", "*_plane(out), tokens, 0)", OF_CUDA_HOST
    ),
    Mutant("forgotten-tokens-stay-in-the-ring", BUFFER, "stored.index_fill_(2, forgotten", "(2, forgotten", OF_NAN),
    Mutant(
        "forgotten-sinks-stay",
        BUFFER,
        ".masked_fill_(rearrange(sinks >= length",
        ".masked_fill(rearrange(sinks >= length",
        OF_NAN,
    ),
    Mutant(
        "forgotten-history-stays", HISTORY, "max(first - self.start, 0)].zero_()", "max(first - self.start, 0)]", OF_NAN
    ),
    Mutant(
        "threads-build-the-kernels-each",
        "swan/kernels/cpu/__init__.py",
        "    with _building:\n        return _built_once(variant())",
        "    return _built_once(variant())",
        ("kernels/test_cpu.py::test_threads_build_once",),
    ),
    Mutant("memory-of-inference-mode", HISTORY, "@outside_inference_mode\n", "", ("cases/test_inference_mode.py",)),
    # numbers that are hard ------------------------------------------------------------------------
    Mutant(
        "what-cannot-be-stored-is-clipped",
        CODES,
        "torch.where(byte < NOT_A_NUMBER, byte.clamp(min=0), NOT_A_NUMBER)",
        "byte.clamp(0, 254)",
        OF_NUMERICS,
    ),
    Mutant(
        "infinity-in-8-bits-is-clipped",
        CODES,
        "torch.where(peak < math.inf, as_bfloat16((peak / 127).clamp(max=largest / 128)), math.nan)",
        "as_bfloat16((peak / 127).clamp(max=largest / 128))",
        OF_NUMERICS,
    ),
    Mutant(
        "scale-of-the-next-octave",
        CODES,
        "byte = (peak.log2() * OCTAVE).ceil() + OFFSET",
        "byte = (peak.log2() * OCTAVE).ceil() + OFFSET + 8",
        OF_NUMERICS,
    ),
    Mutant(
        "a-query-of-nan-is-what-torch-makes-of-it",
        DENSE,
        'return out if q.device.type == "cuda" else out + (q * 0).sum(-1, keepdim=True)',
        "return out",
        OF_NUMERICS,
    ),
    # the tokens that stay --------------------------------------------------------------------------
    Mutant(
        "long-values-are-worth-no-more",
        "swan/modules/keeping.py",
        "rank = _mean_of(state.scores) * _lengths(values, scored)",
        "rank = _mean_of(state.scores)",
        OF_KEEPING,
    ),
    Mutant(
        "padding-may-stay",
        "swan/modules/keeping.py",
        "state.padding.view(-1, 1, 1) - state.dropped, -1)",
        "state.padding.view(-1, 1, 1) - state.dropped, 1)",
        OF_KEEPING,
    ),
    Mutant(
        "a-page-counts-twice-after-a-crop",
        "swan/modules/keeping.py",
        "return [page for page in pages if page[0] >= state.observed]",
        "return pages",
        OF_KEEPING,
    ),
    Mutant(
        "queries-of-a-page-before-count",
        STATE,
        "return self.observed if self.asked >= length else",
        "return self.observed if length >= 0 else",
        OF_KEEPING,
    ),
    Mutant(
        "queries-take-no-room",
        FORECAST,
        "vectors * group * PAGE * plan_layer.keys.d * itemsize",
        "0",
        OF_FULL_BUDGET,
    ),
    Mutant(
        "a-tile-that-one-query-sees-is-seen-by-all",
        ATTENTION,
        "range(min(first), max(end)), range(max(first), min(end))",
        "range(min(first), max(end)), range(min(first), max(end))",
        ("kernels/test_attend_cpu.py::test_tokens_seen_as_numbers",),
    ),
    Mutant(
        "effects-in-bases-of-their-own-text",
        "swan/calibration/artifact.py",
        "if moments.tokens - own.tokens < FEW * own.tokens:",
        "if moments.tokens:",
        OF_BASES,
    ),
    Mutant(
        "steps-are-taken-whole-or-not-at-all",
        "swan/calibration/plan.py",
        "itertools.pairwise(point for point in points if a[0] <= point[0] <= b[0])",
        "itertools.pairwise([a, b])",
        ("calibration/test_effects.py::test_the_last_bytes_are_spent_on_a_part_of_a_step",),
    ),
    Mutant(
        "bases-of-values-by-their-own-text-too",
        "swan/calibration/artifact.py",
        "others = halves[1 - number % 2]",
        "others = halves[number % 2]",
        OF_BASES,
    ),
    Mutant(
        "all-texts-begin-at-the-first-position",
        BATCHES,
        "int(((number * GOLDEN + row * ROOT) % 1) ** 2 * (positions - tokens))",
        "0 * row",
        OF_POSITIONS,
    ),
    Mutant("texts-begin-early-no-more-often", BATCHES, "% 1) ** 2 *", "% 1) *", OF_POSITIONS),
    Mutant(
        "batches-before-do-not-count",
        "swan/calibration/artifact.py",
        "placed(batch, count, spread)",
        "placed(batch, 0, spread)",
        OF_POSITIONS,
    ),
    Mutant(
        "texts-reach-positions-of-other-frequencies",
        BATCHES,
        'in ("dynamic", "longrope")',
        "in ()",
        OF_POSITIONS,
    ),
    Mutant(
        "learned-positions-are-shifted",
        BATCHES,
        "if not rotary or not all",
        "if not all",
        OF_POSITIONS,
    ),
    Mutant(
        "only-errors-of-single-tokens-count",
        "swan/calibration/effects.py",
        "side.amax(0) / tokens",
        "side[0] / tokens",
        ("calibration/test_effects.py",),
    ),
    Mutant(
        "the-last-text-counts-alone",
        "swan/calibration/effects.py",
        "sums[index] = keys + more_keys, values + more_values",
        "sums[index] = more_keys, more_values",
        ("calibration/test_effects.py",),
    ),
    Mutant(
        "keys-and-values-change-places-in-a-prediction",
        "swan/calibration/plan.py",
        "found[index, : len(of_heads), side] =",
        "found[index, : len(of_heads), 1 - side] =",
        ("calibration/test_effects.py",),
    ),
    Mutant(
        "the-mixed-text-is-one-after-the-other",
        "swan/evaluation/texts.py",
        'for pair in itertools.zip_longest(*both, fillvalue="") for page in pair)',
        "for side in both for page in side)",
        ("evaluation/test_texts.py",),
    ),
    # layouts by head ------------------------------------------------------------------------------
    Mutant(
        "heads-compete-as-one", "swan/calibration/plan.py", "RUNS if by_head else 1", "1", ("calibration/test_plan.py",)
    ),
    Mutant(
        "runs-as-unlike-as-can-be",
        "swan/calibration/plan.py",
        "best = min(edges",
        "best = max(edges",
        ("calibration/test_plan.py",),
    ),
    Mutant(
        "a-run-costs-as-much-as-a-layer",
        "swan/calibration/plan.py",
        "share = heads / _heads_of(table[index])",
        "share = 1",
        ("calibration/test_effects.py", "calibration/test_plan.py"),
    ),
    Mutant(
        "a-rank-has-the-heads-of-the-first",
        BY_HEAD,
        "layout.layouts[rank * count : (rank + 1) * count]",
        "layout.layouts[:count]",
        OF_BY_HEAD,
    ),
    Mutant(
        "scales-of-the-run-before", BY_HEAD, "packed.planes[stop] if coded", "packed.planes[1] if coded", OF_BY_HEAD
    ),
    Mutant(
        "places-of-other-heads",
        BY_HEAD,
        "places[:, run.start : run.stop]",
        "places[:, : run.stop - run.start]",
        OF_BY_HEAD,
    ),
    Mutant(
        "a-head-has-the-mask-of-another",
        KERNELS,
        "seen[:, rows] if isinstance(seen, Tensor) and",
        "seen[:, : rows.stop - rows.start] if isinstance(seen, Tensor) and",
        OF_BY_HEAD,
    ),
    Mutant(
        "a-run-on-a-gpu-has-the-mix-of-the-first",
        CUDA + "runs.py",
        "of_run, mixes[number] if mixes",
        "of_run, mixes[0] if mixes",
        OF_CUDA_HEADS,
    ),
    # pages of a server ----------------------------------------------------------------------------
    Mutant(
        "packed-and-dense-at-once",
        PAGED,
        "torch.arange(before, before + queries.shape[2],",
        "torch.arange(before + 1, before + 1 + queries.shape[2],",
        OF_PAGES,
    ),
    Mutant("the-last-query-sees-less", PAGED, "queries.shape[2] - 1  #", "queries.shape[2] - 2  #", OF_PAGES),
    Mutant("window-one-token-longer", PAGED, "(j < i + buffer)", "(j <= i + buffer)", OF_PAGES),
    Mutant("windows-before-the-first-token", PAGED, " & (starts + j >= 0)", "", OF_PAGES),
    Mutant("sinks-twice-in-a-prompt", PAGED, "< starts + i)", "<= starts + i)", OF_PAGES),
    Mutant(
        "decoding-sees-a-token-less",
        PAGED,
        "before.clamp(min=0),",
        "(before - 1).clamp(min=0),",
        OF_PAGES,
    ),
    Mutant("tables-of-others", PAGED, "packed_table[rows]", "packed_table[: len(single)]", OF_PAGES),
    Mutant("sinks-twice-in-the-window", PAGED, "torch.where(first < before, first, -1)", "first", OF_PAGES),
    Mutant("tokens-before-the-first-are-seen", PAGES, "rearrange(columns >= 0", "rearrange(columns >= -9", OF_PAGES),
    Mutant(
        "page-and-place-swapped",
        PAGES,
        "pages[number, :, place]",
        "pages[number, :, place.flip(0)]",
        OF_PAGES,
    ),
    Mutant(
        "scales-between-the-planes",
        PAGES,
        "planes[side].append(take(layout.row_bytes, torch.uint8))",
        "planes[side].append(take(layout.row_bytes, torch.uint8)); start -= self.tokens",
        OF_PAGES,
    ),
    Mutant(
        "heads-of-the-first-rank-for-all",
        SERVED,
        "slice(rank * share, (rank + 1) * share)",
        "slice(0, share)",
        OF_PAGES,
    ),
    Mutant(
        "window-pages-larger-than-packed",
        SERVED,
        "n * dense <= tokens * sum(slots)",
        "n * dense <= 2 * tokens * sum(slots)",
        OF_PAGES,
    ),
    Mutant(
        "tokens-copied-from-within-a-page",
        PAGED,
        "max(TOKENS // packed.tokens, 1) * packed.tokens",
        "TOKENS",
        OF_PAGES,
    ),
    Mutant("padding-is-stored", PAGES, "there = (slots >= 0) & ", "there = ", OF_PAGES),
    Mutant("a-window-is-forgotten", PLANNED, "/ (packed + resting)", "/ packed", OF_SERVERS),
    Mutant("later-versions-serve", "swan/integrations/vllm/settings.py", "(0, 34))", "(0, 35))", OF_SERVERS),
    # those on a GPU
    Mutant("pages-of-the-first-sequence", CUDA + "fetch.cuh", " + at.batch * a.pages.table_batch", "", OF_CUDA_PAGES),
    Mutant(
        "a-page-looked-up-late",
        CUDA + "fetch.cuh",
        "look_up(token + NEXT, stop)",
        "look_up(token, stop)",
        OF_CUDA_PAGES,
    ),
    Mutant(
        "ends-of-the-first-sequence", CUDA + "sight.cuh", "a.end + at.batch * a.pages.end_batch", "a.end", OF_CUDA_PAGES
    ),
    Mutant("tokens-before-the-first", CUDA + "sight.cuh", "PAGE ? a.pages.begin : 0", "0", OF_CUDA_PAGES),
    Mutant("padding-is-packed", CUDA + "pack.cu", " && slots[first + n] >= 0", "", OF_SLOTS),
    Mutant("more-than-the-sinks", CUDA + "pack.cu", " && slot(n) % page < room", "", OF_SLOTS),
]
