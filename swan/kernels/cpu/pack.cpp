// Vectors to the codes and scale bytes of a graded layout, and packed vectors back, on a CPU: each is read once and
// written once.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "tensors.h"

namespace {

using namespace swan;

constexpr int64_t GRAIN = 64;  // vectors worth a thread

// The smallest scale that is not below a number.
uint8_t scale_byte(float peak) {
  const auto& scales = scales_of_bytes();
  return static_cast<uint8_t>(std::min<int64_t>(std::lower_bound(scales.begin(), scales.end(), peak) - scales.begin(), 255));
}

template <int P>
void write_part(const uint8_t* code, int64_t size, int shift, uint8_t* to) {
  for (int64_t i = 0; i < size; i += 8, to += P) {
    uint64_t eight;
    std::memcpy(&eight, code + i, 8);
    eight = eight >> shift & 0x0101010101010101 * ((1 << P) - 1);
    uint8_t bytes[P];
    gather<P>(eight, bytes);
    std::memcpy(to, bytes, std::min<int64_t>(P, part_bytes(size - i, P)));
  }
}

// Writes the parts of the codes of a group.
void write_group(const float* x, const Source::Group& group, float scale, uint8_t* row) {
  uint8_t code[MAX_DIM + 8] = {};
  const float half = 1 << (group.bits - 1), most = (1 << group.bits) - 1;
  for (int64_t i = 0; i < group.size; ++i)
    code[i] = static_cast<uint8_t>(std::min(std::max(std::floor(x[i] / scale * half) + half, 0.f), most));
  int shift = static_cast<int>(group.bits);
  uint8_t* to = row + group.byte;
  for (const int part : PARTS[group.bits]) {
    if (!part) continue;
    shift -= part;
    if (part == 1) write_part<1>(code, group.size, shift, to);
    if (part == 2) write_part<2>(code, group.size, shift, to);
    if (part == 4) write_part<4>(code, group.size, shift, to);
    to += part_bytes(group.size, part);
  }
}

// x: [batch, heads, tokens, d]; layout: 0, size, bits, size, bits, ...; mix: of the groups of few bits.
std::tuple<at::Tensor, at::Tensor> pack(const at::Tensor& x, at::IntArrayRef layout, const at::Tensor& matrix) {
  const at::Tensor none = at::empty({0}, x.options());
  const Source to = source_of({none, none, none, none}, layout);
  TORCH_CHECK(x.dim() == 4 && x.size(3) == to.d && !to.coded.empty(), "vectors do not fit the layout");
  const auto& last = to.coded.back();
  const int64_t bytes = row_bytes(last.byte + code_bytes(last.size, last.bits)), groups = to.coded.size();
  const Mix mix = mix_of(matrix, to, false);
  const at::Tensor dense = x.contiguous();
  const int64_t count = x.size(0) * x.size(1) * x.size(2), size = dense.element_size();
  at::Tensor codes = at::empty({x.size(0), x.size(1), x.size(2), bytes}, x.options().dtype(at::kByte));
  at::Tensor scales = at::empty({x.size(0), x.size(1), x.size(2), groups}, x.options().dtype(at::kByte));
  const auto* from = static_cast<const uint8_t*>(dense.const_data_ptr());
  auto *rows = codes.mutable_data_ptr<uint8_t>(), *scale = scales.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, count, GRAIN, [&](int64_t begin, int64_t end) {
    float vector[MAX_DIM];
    for (int64_t v = begin; v < end; ++v) {
      to_float(from + v * to.d * size, dense.scalar_type(), to.d, vector);
      mix.apply(vector);
      std::fill_n(rows + v * bytes, bytes, 0);
      for (int64_t g = 0; g < groups; ++g) {
        const auto& group = to.coded[g];
        float peak = 0;
        for (int64_t c = group.start; c < group.start + group.size; ++c) peak = std::max(peak, std::abs(vector[c]));
        const uint8_t byte = scale[v * groups + g] = scale_byte(peak);
        write_group(vector + group.start, group, scales_of_bytes()[byte], rows + v * bytes);
      }
    }
  });
  return {codes, scales};
}

// The first `tokens` of packed vectors, in the coordinates in which they are stored, as those of `like`'s dtype.
at::Tensor unpack(at::TensorList planes, at::IntArrayRef layout, int64_t tokens, const at::Tensor& like) {
  const Source from = source_of(planes, layout);
  const at::Tensor& any = any_of(planes);
  const int64_t heads = any.size(1), vectors = any.size(0) * heads * tokens;
  TORCH_CHECK(any.size(2) >= tokens, "there are fewer tokens");
  at::Tensor out = at::empty({any.size(0), heads, tokens, from.d}, like.options());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  at::parallel_for(0, vectors, GRAIN, [&](int64_t begin, int64_t end) {
    float vector[MAX_DIM + CHUNK];
    std::fill_n(vector, MAX_DIM + CHUNK, 0.f);
    for (int64_t v = begin; v < end; ++v) {
      from.unpack(v / tokens / heads, v / tokens % heads, v % tokens, vector);
      from_float(vector, out.scalar_type(), from.d, to + v * from.d * out.element_size());
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(swan, m) {
  m.def(SWAN_OPERATOR(pack_cpu) "(Tensor x, int[] layout, Tensor matrix) -> (Tensor, Tensor)");
  m.def(SWAN_OPERATOR(unpack_cpu) "(Tensor[] planes, int[] layout, SymInt tokens, Tensor like) -> Tensor");
}

TORCH_LIBRARY_IMPL(swan, CPU, m) {
  m.impl(SWAN_OPERATOR(pack_cpu), &pack);
  m.impl(SWAN_OPERATOR(unpack_cpu), &unpack);
}
