// Vectors to the codes and scale bytes of a graded layout, on a CPU: each vector is read once and written once.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "cpu_common.h"

namespace {

constexpr int64_t MAX_DIM = 256;
constexpr int64_t GRAIN = 256;  // vectors worth a thread

// The smallest scale that is not below a number.
uint8_t scale_byte(float peak) {
  const auto& scales = swan::scales_of_bytes();
  return static_cast<uint8_t>(std::min<int64_t>(std::lower_bound(scales.begin(), scales.end(), peak) - scales.begin(), 255));
}

// Writes the parts of the codes of a group; returns the bytes written.
int64_t write_group(const float* x, int64_t size, int64_t bits, float scale, uint8_t* to) {
  uint8_t code[MAX_DIM];
  const float half = 1 << (bits - 1), most = (1 << bits) - 1;
  for (int64_t i = 0; i < size; ++i)
    code[i] = static_cast<uint8_t>(std::min(std::max(std::floor(x[i] / scale * half) + half, 0.f), most));
  int64_t written = 0;
  int shift = static_cast<int>(bits);
  for (const int part : swan::PARTS[bits]) {
    if (!part) continue;
    shift -= part;
    const int64_t n = (size * part + 7) / 8;
    const int mask = (1 << part) - 1;
    uint8_t* plane = to + written;
    std::fill_n(plane, n, 0);
    for (int64_t start = 0, place = 0; start < size; start += n, place += part)
      for (int64_t i = 0; i < std::min(n, size - start); ++i)
        plane[i] |= static_cast<uint8_t>((code[start + i] >> shift & mask) << place);
    written += n;
  }
  return written;
}

// x: [batch, heads, tokens, d] in mixed coordinates; layout: 0, size, bits, size, bits, ...
std::tuple<at::Tensor, at::Tensor> pack(const at::Tensor& x, at::IntArrayRef layout) {
  const at::IntArrayRef groups = layout.slice(1);
  int64_t bytes = 0, scales = 0;
  for (size_t i = 0; i < groups.size(); i += 2) {
    if (groups[i + 1] < 1 || groups[i + 1] > 8) continue;
    bytes += swan::code_bytes(groups[i], groups[i + 1]);
    ++scales;
  }
  const at::Tensor dense = x.contiguous();
  const int64_t d = x.size(3), count = x.size(0) * x.size(1) * x.size(2), size = dense.element_size();
  at::Tensor codes = at::empty({x.size(0), x.size(1), x.size(2), bytes}, x.options().dtype(at::kByte));
  at::Tensor scale = at::empty({x.size(0), x.size(1), x.size(2), scales}, x.options().dtype(at::kByte));
  const auto* from = static_cast<const uint8_t*>(dense.const_data_ptr());
  auto *to = codes.mutable_data_ptr<uint8_t>(), *scale_to = scale.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, count, GRAIN, [&](int64_t begin, int64_t end) {
    float vector[MAX_DIM];
    for (int64_t v = begin; v < end; ++v) {
      swan::to_float(from + v * d * size, dense.scalar_type(), d, vector);
      int64_t start = 0, byte = v * bytes, group = v * scales;
      for (size_t i = 0; i < groups.size(); i += 2) {
        const int64_t length = groups[i], bits = groups[i + 1];
        if (bits >= 1 && bits <= 8) {
          float peak = 0;
          for (int64_t c = start; c < start + length; ++c) peak = std::max(peak, std::abs(vector[c]));
          scale_to[group] = scale_byte(peak);
          byte += write_group(vector + start, length, bits, swan::scales_of_bytes()[scale_to[group]], to + byte);
          ++group;
        }
        start += length;
      }
    }
  });
  return {codes, scale};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(swan, m) { m.def(SWAN_OPERATOR(pack_cpu) "(Tensor x, int[] layout) -> (Tensor, Tensor)"); }

TORCH_LIBRARY_IMPL(swan, CPU, m) { m.impl(SWAN_OPERATOR(pack_cpu), &pack); }
