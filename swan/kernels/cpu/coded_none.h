// Graded keys and values of few bits on CPUs without instructions for them: through tiles of floats.
#pragma once

#include "tiles.h"

namespace swan {

class Coded {
 public:
  static constexpr int64_t ROWS = 4;
  static bool reads(const Source&, const Source&) { return false; }
  Coded(const Source&, const Source&, bool) {}
  void attend(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, const bool* const (&)[ROWS], float*, float*,
              float*) const {}
};

}  // namespace swan
