// The mix of the coordinates inside groups: a product with an orthonormal matrix for each.
#pragma once

#include "tiles.h"

namespace swan {

class Mix {
 public:
  Mix() = default;  // changes nothing

  // matrix: [d, d], of which only the blocks of the groups are read; floats are read where they are.
  Mix(const uint8_t* matrix, c10::ScalarType dtype, int64_t d, const std::vector<Source::Group>& groups)
      : groups_(groups), d_(d), matrix_(reinterpret_cast<const float*>(matrix)) {
    if (dtype == c10::ScalarType::Float) return;
    wide_.resize(d * d);
    to_float(matrix, dtype, d * d, wide_.data());
    matrix_ = wide_.data();
  }
  Mix(const Mix&) = delete;  // points into itself
  Mix(Mix&&) = default;
  Mix& operator=(Mix&&) = default;

  // Mixes the groups of a vector in place; its other coordinates stay.
  void apply(float* x) const {
    for (const auto& group : groups_) {
      float mixed[MAX_DIM];
      const float *block = block_of(group), *from = x + group.start;
      int64_t j = 0;
      for (; j + 4 * LANES <= group.size; j += 4 * LANES) columns<4>(from, block + j, group.size, mixed + j);
      for (; j + LANES <= group.size; j += LANES) columns<1>(from, block + j, group.size, mixed + j);
      for (; j < group.size; ++j) {
        mixed[j] = 0;
        for (int64_t i = 0; i < group.size; ++i) mixed[j] += from[i] * block[i * d_ + j];
      }
      std::copy_n(mixed, group.size, x + group.start);
    }
  }

  // The way back.
  void undo(float* x) const {
    for (const auto& group : groups_) {
      float plain[MAX_DIM];
      const float *block = block_of(group), *from = x + group.start;
      const int64_t whole = group.size / LANES * LANES;
      for (int64_t i = 0; i < whole; i += LANES) {
        Vector sum[LANES] = {};
        for (int64_t j = 0; j < whole; j += LANES)
          for (int r = 0; r < LANES; ++r) sum[r] += load(from + j) * load(block + (i + r) * d_ + j);
        store(plain + i, sums(sum));
      }
      for (int64_t i = 0; i < group.size; ++i) {
        const int64_t first = i < whole ? whole : 0;  // of the columns that are not in yet
        if (!first) plain[i] = 0;
        for (int64_t j = first; j < group.size; ++j) plain[i] += from[j] * block[i * d_ + j];
      }
      std::copy_n(plain, group.size, x + group.start);
    }
  }

 private:
  std::vector<Source::Group> groups_;
  int64_t d_ = 0;
  const float* matrix_ = nullptr;
  std::vector<float> wide_;

  const float* block_of(const Source::Group& group) const { return matrix_ + group.start * (d_ + 1); }

  // As many vectors of columns of the product.
  template <int N>
  void columns(const float* x, const float* block, int64_t size, float* to) const {
    Vector sum[N] = {};
    for (int64_t i = 0; i < size; ++i)
      for (int n = 0; n < N; ++n) sum[n] += x[i] * load(block + i * d_ + n * LANES);
    for (int n = 0; n < N; ++n) store(to + n * LANES, sum[n]);
  }
};

}  // namespace swan
