// Vectors to the bytes of a graded layout, and packed vectors back, on a CPU: each is read once and written once.

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "tensors.h"

namespace {

using namespace swan;

constexpr int64_t GRAIN = 64;  // vectors worth a thread

constexpr float CLIPS[] = {0, 1.0f, 2.2f, 2.6f};  // as in swan/storage/codes.py, by bits
constexpr float HALF_AN_EIGHTH_DOWN = 0.95760328f;  // 2 ** (-1 / 16): what is rounded up from there is the nearest

// The byte of the smallest scale that is not below a number; NOT_A_NUMBER for what is above all scales, and for NaN.
uint8_t byte_of(float peak) {
  const auto& scales = scales_of_bytes();
  if (!(peak <= scales[NOT_A_NUMBER - 1])) return NOT_A_NUMBER;
  return static_cast<uint8_t>(std::lower_bound(scales.begin(), scales.end() - 1, peak) - scales.begin());
}

// The largest magnitude of a group, or NaN.
float peak_of(const float* x, int64_t size) {
  float peak = 0;
  bool numbers = true;
  for (int64_t i = 0; i < size; ++i) {
    numbers &= x[i] == x[i];
    peak = std::max(peak, std::abs(x[i]));
  }
  return numbers ? peak : NAN;
}

// The sum of products, in any order.
float dot(const float* x, const float* y, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += x[i] * y[i];
  return sum;
}

// Writes the codes of a group and returns the byte of its scale, as quantize_group in swan/storage/codes.py does.
uint8_t quantize(const float* x, int64_t size, int64_t bits, uint8_t* code) {
  const uint8_t byte = byte_of(peak_of(x, size));
  if (byte == NOT_A_NUMBER) {
    std::fill_n(code, size, uint8_t(0));
    return byte;
  }
  const float scale = scales_of_bytes()[byte], half = 1 << (bits - 1), most = (1 << bits) - 1;
  float part[MAX_DIM], middle[MAX_DIM];
  for (int64_t i = 0; i < size; ++i) part[i] = x[i] / scale;
  const bool clipped = bits < int64_t(std::size(CLIPS));
  const float square = clipped ? dot(part, part, size) : 0;
  float clip = clipped ? CLIPS[bits] * std::sqrt(square / size) : 1;
  if (!(clip > 0 && clip < 1)) clip = 1;
  for (int64_t i = 0; i < size; ++i) {
    const float step = std::min(std::max(std::floor(part[i] / clip * half) + half, 0.f), most);
    code[i] = static_cast<uint8_t>(step);
    middle[i] = step - (half - 0.5f);
  }
  if (!clipped) return byte;
  const float along = dot(part, middle, size);
  if (!(along > 0)) return 0;  // all numbers are 0
  return std::min<uint8_t>(byte_of(scale * half * square / along * HALF_AN_EIGHTH_DOWN), NOT_A_NUMBER - 1);
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

// Writes the parts of the codes of a group; returns the byte of its scale.
uint8_t write_group(const float* x, const Source::Group& group, uint8_t* row) {
  uint8_t code[MAX_DIM + 8] = {};
  const uint8_t scale = quantize(x, group.size, group.bits, code);
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
  return scale;
}

uint8_t* row_of(const Plane& plane, int64_t b, int64_t h, int64_t t) { return const_cast<uint8_t*>(plane.row(b, h, t)); }

// A tensor that is written to.
Plane plane_to(const at::Tensor& t) {
  at::assert_no_internal_overlap(t);
  t.mutable_data_ptr();  // memory of its own, if it was shared until written to
  return plane_of(t);
}

// The tensors that a graded layout stores, and how vectors are written there.
class Target {
 public:
  // tensors: codes, whole numbers and scales, those that there are; matrix: the mix, or an empty tensor.
  Target(at::TensorList tensors, at::IntArrayRef layout, const at::Tensor& matrix)
      : to_({}, layout.data(), layout.size()), mix_(mix_of(matrix, to_)) {
    const bool coded = !to_.coded.empty(), whole = !to_.dense.empty();
    TORCH_CHECK(!to_.topk && tensors.size() == size_t(coded ? 2 : 0) + (whole ? 1 : 0), "expected a graded layout");
    TORCH_CHECK(to_.d <= MAX_DIM, "at most ", MAX_DIM, " coordinates");
    if (coded) to_.codes = plane_to(tensors.front()), to_.scales = plane_to(tensors.back()), to_.row = tensors[0].size(3);
    if (whole) to_.whole = plane_to(tensors[coded ? 1 : 0]), to_.dtype = tensors[coded ? 1 : 0].scalar_type();
    tokens_ = tensors[0].size(2);
  }

  int64_t d() const { return to_.d; }
  int64_t tokens() const { return tokens_; }

  // How many tensors a layout stores.
  static size_t tensors_of(at::IntArrayRef layout) {
    const Source source({}, layout.data(), layout.size());
    return (source.coded.empty() ? 0 : 2) + (source.dense.empty() ? 0 : 1);
  }

  // Stores a vector as a token.
  void write(const uint8_t* from, c10::ScalarType dtype, int64_t b, int64_t h, int64_t t) const {
    if (!to_.coded.empty()) {
      float vector[MAX_DIM];
      to_float(from, dtype, to_.d, vector);
      mix_.apply(vector);
      uint8_t *row = row_of(to_.codes, b, h, t), *scale = row_of(to_.scales, b, h, t);
      std::fill_n(row, to_.row, 0);
      for (const auto& group : to_.coded) *scale++ = write_group(vector + group.start, group, row);
    }
    if (to_.dense.empty()) return;
    uint8_t* numbers = row_of(to_.whole, b, h, t);
    for (const auto& group : to_.dense)
      numbers = std::copy_n(from + group.start * bytes_of(dtype), group.size * bytes_of(dtype), numbers);
  }

 private:
  Source to_;
  Mix mix_;
  int64_t tokens_;
};

// x: [batch, heads, tokens, d]; layout: 0, size, bits, size, bits, ...; matrix: the mix, or empty. Returns what it stores.
std::vector<at::Tensor> pack(const at::Tensor& x, at::IntArrayRef layout, const at::Tensor& matrix) {
  const Source sizes({}, layout.data(), layout.size());
  TORCH_CHECK(x.dim() == 4 && x.size(3) == sizes.d, "vectors do not fit the layout");
  const int64_t heads = x.size(1), count = x.size(2);
  const auto plane = [&](int64_t width, c10::ScalarType dtype) {
    return at::empty({x.size(0), heads, count, width}, x.options().dtype(dtype));
  };
  std::vector<at::Tensor> tensors;
  if (!sizes.coded.empty()) {
    const auto& last = sizes.coded.back();
    tensors.push_back(plane(row_bytes(last.byte + code_bytes(last.size, last.bits)), at::kByte));
  }
  int64_t whole = 0;
  for (const auto& group : sizes.dense) whole += group.size;
  if (whole) tensors.push_back(plane(whole, x.scalar_type()));
  if (!sizes.coded.empty()) tensors.push_back(plane(sizes.coded.size(), at::kByte));
  const Target target(tensors, layout, matrix);
  const at::Tensor dense = with_dense_rows(x);
  const Plane from = plane_of(dense);
  at::parallel_for(0, x.size(0) * heads * count, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / count / heads, h = i / count % heads, t = i % count;
      target.write(from.row(b, h, t), x.scalar_type(), b, h, t);
    }
  });
  return tensors;
}

// Keys or values of a cache: new tokens, sinks and ring, and the packed history.
struct Side {
  const at::Tensor dense;
  const Plane from, recent;

  // history: the tensors of each run of heads, one after the other; mixes: one for each.
  Side(const at::Tensor& x, const at::Tensor& recent, at::TensorList history, at::IntArrayRef layout, at::TensorList mixes)
      : dense(with_dense_rows(x)), from(plane_of(dense)), recent(plane_to(recent)) {
    size_t first = 0;
    for_runs(layout, [&](at::IntArrayRef numbers, size_t run) {
      const size_t count = Target::tensors_of(numbers);
      TORCH_CHECK(first + count <= history.size() && run < mixes.size(), "the history does not fit its layout");
      const at::TensorList tensors = history.slice(first, count);
      runs_.push_back({Target(tensors, numbers, mixes[run]), static_cast<int64_t>(of_head_.size())});
      of_head_.resize(of_head_.size() + tensors[0].size(1), run);
      first += count;
      fits_ &= x.dim() == 4 && x.size(3) == runs_.back().target.d();
    });
    fits_ &= first == history.size() && of_head_.size() == size_t(x.size(1));
    TORCH_CHECK(fits_ && recent.size(3) == x.size(3) && recent.scalar_type() == x.scalar_type() &&
                    recent.sizes().slice(0, 2).equals(x.sizes().slice(0, 2)),
                "new tokens do not fit the cache");
  }

  int64_t room() const { return runs_[0].target.tokens(); }

  // Stores a vector as a token of the history.
  void write(const uint8_t* vector, c10::ScalarType dtype, int64_t b, int64_t h, int64_t t) const {
    const Run& run = runs_[of_head_[h]];
    run.target.write(vector, dtype, b, h - run.first, t);
  }

 private:
  struct Run {
    Target target;
    int64_t first;  // head
  };
  std::vector<Run> runs_;
  std::vector<size_t> of_head_;  // the run of each head
  bool fits_ = true;
};

// New tokens of a cache: each takes the slot of the oldest token of the ring, which is packed at its place in the history
// if it is one that the history keeps. `counters`: tokens seen before, and the oldest column in the ring; `start`: the
// column of the first token of the history.
void take_in(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_recent, const at::Tensor& v_recent,
             at::TensorList k_history, at::TensorList v_history, at::IntArrayRef k_layout, at::IntArrayRef v_layout,
             at::TensorList mixes, at::TensorList counters, const std::optional<at::Tensor>& padding, int64_t sinks,
             int64_t start) {
  TORCH_CHECK(v.sizes().slice(0, 3).equals(k.sizes().slice(0, 3)), "keys and values do not fit each other");
  const size_t runs = runs_in(k_layout);
  const Side sides[] = {{k, k_recent, k_history, k_layout, mixes.slice(0, runs)},
                        {v, v_recent, v_history, v_layout, mixes.slice(runs)}};
  const int64_t heads = k.size(1), tokens = k.size(2), size = k_recent.size(2) - sinks;
  const int64_t length = *counters[0].const_data_ptr<int64_t>(), first = *counters[1].const_data_ptr<int64_t>();
  TORCH_CHECK(length + tokens - size - start <= sides[0].room(), "the history has no room for the new tokens");
  const auto dtype = k.scalar_type();
  const std::optional<at::Tensor> earlier = padding ? std::optional(padding->to(at::kLong).contiguous()) : padding;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(tokens, 1));
  at::parallel_for(0, 2 * k.size(0) * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Side& side = sides[i % 2];
      const int64_t b = i / 2 / heads, h = i / 2 % heads, bytes = side.dense.size(3) * bytes_of(dtype);
      const int64_t before = earlier ? earlier->const_data_ptr<int64_t>()[b] : 0;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t column = length + t, oldest = column - size;
        const uint8_t* from = side.from.row(b, h, t);
        uint8_t* slot = row_of(side.recent, b, h, sinks + column % size);
        if (oldest >= std::max(first, start)) side.write(slot, dtype, b, h, oldest - start);
        std::copy_n(from, bytes, slot);
        const int64_t place = column - before;
        if (0 <= place && place < sinks) std::copy_n(from, bytes, row_of(side.recent, b, h, place));
      }
    }
  });
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
  m.def(SWAN_OPERATOR(pack_cpu) "(Tensor x, int[] layout, Tensor matrix) -> Tensor[]");
  m.def(
      SWAN_OPERATOR(take_in_cpu)
      "(Tensor k, Tensor v, Tensor(a!) k_recent, Tensor(b!) v_recent, Tensor(c!)[] k_history, Tensor(d!)[] v_history, "
      "int[] k_layout, int[] v_layout, Tensor[] mixes, Tensor[] counters, Tensor? padding, SymInt sinks, SymInt start) "
      "-> ()");
  m.def(SWAN_OPERATOR(unpack_cpu) "(Tensor[] planes, int[] layout, SymInt tokens, Tensor like) -> Tensor");
}

TORCH_LIBRARY_IMPL(swan, CPU, m) {
  m.impl(SWAN_OPERATOR(pack_cpu), &pack);
  m.impl(SWAN_OPERATOR(take_in_cpu), &take_in);
  m.impl(SWAN_OPERATOR(unpack_cpu), &unpack);
}
