// Tensors as the kernels read them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "mix.h"

namespace swan {

constexpr int64_t BY_HEAD = 2;  // the first number of a layout of runs of heads

inline Plane plane_of(const at::Tensor& t) {
  if (!t.numel()) return {};
  TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || t.size(3) == 1), "expected [batch, heads, tokens, width]");
  const int64_t size = t.element_size();
  return {static_cast<const uint8_t*>(t.const_data_ptr()), t.stride(0) * size, t.stride(1) * size, t.stride(2) * size};
}

// A tensor [batch, heads, tokens, width] as it is if its last axis is dense, else a copy.
inline at::Tensor with_dense_rows(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

// tensors: codes, whole, scales, positions, each a tensor or an empty one.
inline Source source_of(at::TensorList tensors, at::IntArrayRef layout) {
  Planes planes{plane_of(tensors[0]), plane_of(tensors[1]), plane_of(tensors[2]), plane_of(tensors[3])};
  if (tensors[0].dim() == 4) planes.row = tensors[0].size(3);
  if (tensors[1].dim() == 4) planes.dtype = tensors[1].scalar_type();
  const Source source(planes, layout.data(), layout.size());
  TORCH_CHECK(source.d <= MAX_DIM, "at most ", MAX_DIM, " coordinates");
  return source;
}

// The mix of the groups of few bits, by a matrix [d, d] that outlives it, or by an empty tensor: none.
inline Mix mix_of(const at::Tensor& matrix, const Source& source) {
  if (!matrix.numel()) return {};
  TORCH_CHECK(matrix.is_contiguous() && matrix.numel() == source.d * source.d, "expected a mix [d, d]");
  const auto* data = static_cast<const uint8_t*>(matrix.const_data_ptr());
  return Mix(data, matrix.scalar_type(), source.d, source.coded);
}

// One of the tensors that there are.
inline const at::Tensor& any_of(at::TensorList tensors) {
  return *std::find_if(tensors.begin(), tensors.end(), [](const at::Tensor& t) { return t.dim() == 4; });
}

// Packed keys or values of a layer. Neighbouring KV heads in one layout are a run, mostly all of them; heads are counted
// through, so that the source of a run is read at the head's own number.
struct Stored {
  struct Run {
    Source source;
    Mix mix;
  };
  std::vector<Run> runs;
  std::vector<size_t> of_head;  // the run of each head
  int64_t d = 0, width = 0;     // `width`: floats of a vector of any run, a whole number of chunks

  int64_t heads() const { return of_head.size(); }
  const Source& source(int64_t head) const { return runs[of_head[head]].source; }
  const Mix& mix(int64_t head) const { return runs[of_head[head]].mix; }
};

// Calls `add` with the numbers of the layout of each run, and its place among the runs. layout: that of all heads, or
// {2, heads, how many numbers follow, numbers, heads, ...}.
template <typename Add>
void for_runs(at::IntArrayRef layout, const Add& add) {
  if (layout[0] != BY_HEAD) return add(layout, 0);
  for (size_t at = 1, run = 0; at < layout.size(); at += 2 + layout[at + 1], ++run)
    add(layout.slice(at + 2, layout[at + 1]), run);
}

inline size_t runs_in(at::IntArrayRef layout) {
  size_t count = 0;
  for_runs(layout, [&](at::IntArrayRef, size_t) { ++count; });
  return count;
}

// planes: codes, whole, scales, positions of each run, each a tensor or an empty one; mixes: a matrix for each, or empty.
inline Stored stored_of(at::TensorList planes, at::IntArrayRef layout, at::TensorList mixes) {
  Stored stored;
  TORCH_CHECK(planes.size() == 4 * mixes.size() && mixes.size() == runs_in(layout), "expected four planes for each run");
  for_runs(layout, [&](at::IntArrayRef numbers, size_t run) {
    const at::TensorList tensors = planes.slice(4 * run, 4);
    Source source = source_of(tensors, numbers);
    const int64_t first = stored.heads();
    for (Plane* plane : {&source.codes, &source.whole, &source.scales, &source.positions})
      plane->data -= first * plane->head;
    TORCH_CHECK(!run || source.d == stored.d, "heads have one dimension");
    stored.d = source.d;
    stored.width = std::max(stored.width, rounded_up(source.used, CHUNK));
    stored.of_head.resize(first + any_of(tensors).size(1), run);
    Mix mix = mix_of(mixes[run], source);
    stored.runs.push_back({std::move(source), std::move(mix)});
  });
  return stored;
}

}  // namespace swan
