// Tensors as the kernels read them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "mix.h"

namespace swan {

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

}  // namespace swan
