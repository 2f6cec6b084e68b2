// The mix of the coordinates inside groups: a product with an orthonormal matrix for each.
#pragma once

#include "tiles.h"

namespace swan {

class Mix {
 public:
  // matrix: [d, d], of which only the blocks of the groups are read; transposed: for the way back.
  Mix(const uint8_t* matrix, c10::ScalarType dtype, int64_t d, const std::vector<Source::Group>& groups, bool transposed)
      : groups_(groups) {
    const int64_t size = bytes_of(dtype);
    for (const auto& group : groups) {
      const int64_t width = rounded_up(group.size, LANES);
      std::vector<float> block(group.size * width);
      float row[MAX_DIM];
      for (int64_t i = 0; i < group.size; ++i) {
        to_float(matrix + ((group.start + i) * d + group.start) * size, dtype, group.size, row);
        for (int64_t j = 0; j < group.size; ++j) block[transposed ? j * width + i : i * width + j] = row[j];
      }
      blocks_.push_back(std::move(block));
    }
  }

  // Mixes the groups of a vector in place; its other coordinates stay.
  void apply(float* x) const {
    for (size_t g = 0; g < groups_.size(); ++g) {
      const int64_t size = groups_[g].size, width = rounded_up(size, LANES);
      const float* block = blocks_[g].data();
      float* at = x + groups_[g].start;
      Vector sum[MAX_DIM / LANES] = {};
      for (int64_t i = 0; i < size; ++i)
        for (int64_t j = 0; j < width / LANES; ++j) sum[j] += at[i] * load(block + i * width + j * LANES);
      std::memcpy(at, sum, size * sizeof(float));
    }
  }

 private:
  std::vector<Source::Group> groups_;
  std::vector<std::vector<float>> blocks_;
};

}  // namespace swan
