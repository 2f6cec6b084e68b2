// The inner loops of the CPU kernels in a program of their own, without torch: for CPUs that are emulated.
// Reads from stdin what tests/kernels/test_other_cpus.py writes; writes sums, peaks and totals of each row to stdout.

#include <cstdio>

#if defined(__AVX2__) && defined(__FMA__)
#include "coded_avx2.h"
#else
#include "coded_none.h"
#endif

using namespace swan;

template <typename T>
std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(1);
  return values;
}

struct Vectors {  // of one head
  std::vector<int64_t> layout;
  std::vector<uint8_t> codes, scales;

  Source source(int64_t tokens) {
    const auto sizes = read<int64_t>(3);  // of the layout, a row of codes, and its scales
    layout = read<int64_t>(sizes[0]);
    codes = read<uint8_t>(tokens * sizes[1]), scales = read<uint8_t>(tokens * sizes[2]);
    Planes planes;
    planes.codes = {codes.data(), 0, 0, sizes[1]}, planes.scales = {scales.data(), 0, 0, sizes[2]};
    planes.row = sizes[1];
    return Source(planes, layout.data(), layout.size());
  }
};

int main() {
  const auto sizes = read<int64_t>(2);
  const int64_t tokens = sizes[0], rows = sizes[1];
  Vectors keys, values;
  const Source k = keys.source(tokens), v = values.source(tokens);
  const auto q = read<float>(rows * k.d);
  const int64_t k_width = rounded_up(k.used, CHUNK), v_width = rounded_up(v.used, CHUNK);
  std::vector<float> query(rows * k_width), out(rows * v_width), peak(rows), total(rows);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(q.data() + r * k.d, k.used, query.data() + r * k_width);
  if (rows <= Coded::ROWS && Coded::reads(k, v)) {
    const bool* seen[Coded::ROWS] = {};
    Coded(k, v, false).attend(query.data(), rows, 0, 0, 0, tokens, seen, out.data(), peak.data(), total.data());
  } else {
    const Mask mask;
    Stretch{k, v, mask, query.data(), 0, 0, rows, rows, 1, out.data(), peak.data(), total.data()}.run(0, tokens);
  }
  for (int64_t r = 0; r < rows; ++r) std::fwrite(out.data() + r * v_width, sizeof(float), v.d, stdout);
  std::fwrite(peak.data(), sizeof(float), rows, stdout);
  std::fwrite(total.data(), sizeof(float), rows, stdout);
}
