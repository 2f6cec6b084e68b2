// Attention of few queries over a packed history, and over dense tokens beside it, on a CPU. Threads take KV heads and
// stretches of tokens; parts merge by log-sum-exp. Codes of few bits are multiplied as they are where the CPU has the
// instructions for it (coded_*.h); else tokens are unpacked to floats (tiles.h).

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "tensors.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "coded_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "coded_avx2.h"
#else
#include "coded_none.h"
#endif

namespace {

using namespace swan;

constexpr int64_t MOST_ROWS = 16;  // query rows up to which codes are read anew for each four
constexpr int64_t LEAST = 256;     // tokens worth a thread of their own
constexpr int64_t GRAIN = 64;      // query rows worth a thread
constexpr int64_t PAGE = 64;       // tokens of a page: a multiple of these, which are read at a time

// The history, or the tokens beside it that are not packed: queries times the scale, and what each part found, in rows.
// Vectors of a KV head stand as close as its layouts allow.
struct Side {
  const Stored &k, &v;
  const Mask mask;
  const int64_t tokens, splits, stretch;
  std::vector<float> q, outs, peaks, totals;
  std::vector<int64_t> limits;  // tokens of each sequence, which may be fewer; empty: of all alike

  // `rows` query rows of each of `workers` KV heads of all sequences.
  Side(const Stored& k, const Stored& v, const Mask& mask, int64_t tokens, int64_t workers, int64_t rows)
      : k(k), v(v), mask(mask), tokens(tokens), splits(splits_of(tokens, workers)),
        stretch(rounded_up((tokens + splits - 1) / splits, PAGE)), q(workers * rows * k.width),
        outs(workers * splits * rows * v.width), peaks(workers * splits * rows), totals(peaks.size()), rows_(rows) {}

  static int64_t splits_of(int64_t tokens, int64_t workers) {
    const int64_t wanted = (4 * at::get_num_threads() + workers - 1) / std::max<int64_t>(workers, 1);
    return std::max<int64_t>(1, std::min(wanted, tokens / LEAST));
  }

  int64_t limit(int64_t b) const { return limits.empty() ? tokens : limits[b]; }

  // The queries of a KV head, and what a part of its tokens gave.
  float* queries_of(int64_t worker) { return q.data() + worker * rows_ * k.width; }
  float* outs_of(int64_t part) { return outs.data() + part * rows_ * v.width; }

  void query(int64_t row, const float* x, float scale) {
    const int64_t used = k.source(head_of(row)).used;
    float* to = queries_of(row / rows_) + row % rows_ * rounded_up(used, CHUNK);
    for (int64_t c = 0; c < used; ++c) to[c] = x[c] * scale;
  }

  // Whether a query sees some token.
  bool seen(int64_t b, int64_t head, int64_t query) const {
    if (!mask.data) return tokens > 0;
    return std::memchr(mask.data + b * mask.batch + head * mask.head + query * mask.query, true, tokens);
  }

  float peak(int64_t row) const {
    float most = NOTHING;
    for (int64_t s = 0; s < splits; ++s) most = std::max(most, peaks[part(row, s)]);
    return most;
  }

  // Adds what a row found to sums [d of v]; returns the sum of its weights.
  float add(int64_t row, float most, float* sums) const {
    const int64_t used = v.source(head_of(row)).used;
    float total = 0;
    for (int64_t s = 0; s < splits; ++s) {
      const int64_t i = part(row, s);
      const float factor = exponential(peaks[i] - most);
      const float* out = outs.data() + i / rows_ * rows_ * v.width + row % rows_ * rounded_up(used, CHUNK);
      total += factor * totals[i];
      for (int64_t c = 0; c < used; ++c) sums[c] += factor * out[c];
    }
    return total;
  }

 private:
  const int64_t rows_;
  int64_t head_of(int64_t row) const { return row / rows_ % k.heads(); }
  int64_t part(int64_t row, int64_t split) const { return (row / rows_ * splits + split) * rows_ + row % rows_; }
};

Mask view_of(const std::optional<at::Tensor>& mask) {
  if (!mask) return {};
  const auto stride = [&](int axis) { return mask->size(axis) == 1 ? 0 : mask->stride(axis); };
  return {mask->const_data_ptr<bool>(), stride(0), stride(1), stride(2)};
}

// `sequences`: of the planes, or pages.
void check(const at::Tensor& q, const Stored& k, const Stored& v, at::TensorList k_planes, at::TensorList v_planes,
           int64_t sequences, int64_t tokens, const std::optional<at::Tensor>& mask, at::TensorList recent,
           const std::optional<at::Tensor>& recent_mask) {
  const int64_t batch = q.size(0), kv_heads = k.heads();
  for (const at::TensorList planes : {k_planes, v_planes})
    for (const at::Tensor& plane : planes)
      TORCH_CHECK(plane.dim() != 4 || (plane.size(0) == sequences && plane.size(2) >= tokens),
                  "keys and values do not fit the queries or each other");
  TORCH_CHECK(q.dim() == 4 && q.size(3) == k.d && kv_heads && q.size(1) % kv_heads == 0 && v.heads() == kv_heads,
              "keys and values do not fit the queries or each other");
  const auto fits = [&](const std::optional<at::Tensor>& m, int64_t count) {
    return !m || (m->scalar_type() == at::kBool && m->dim() == 4 && (m->size(0) == 1 || m->size(0) == batch) &&
                  (m->size(1) == 1 || m->size(1) == q.size(1)) && m->size(2) == q.size(2) && m->size(3) == count);
  };
  TORCH_CHECK(fits(mask, tokens), "the mask does not fit");
  if (recent.empty()) return;
  for (int i = 0; i < 2; ++i)
    TORCH_CHECK(recent[i].dim() == 4 && recent[i].size(0) == batch && recent[i].size(1) == kv_heads &&
                    recent[i].size(2) == recent[0].size(2) && recent[i].size(3) == (i ? v.d : k.d) &&
                    recent[i].scalar_type() == q.scalar_type(),
                "recent keys and values do not fit the history");
  TORCH_CHECK(fits(recent_mask, recent[0].size(2)), "the mask of the recent tokens does not fit");
}

// Whether all groups of few bits of some tokens are numbers.
bool all_numbers(const Source& x, int64_t b, int64_t h, int64_t begin, int64_t end) {
  const int64_t groups = x.coded.size();
  int64_t step = 1;
  for (int64_t t = begin; t < end; t += step) {
    if (x.scales.token == groups) step = x.scales.together(t, end);  // scales of tokens side by side
    if (std::memchr(x.scales.row(b, h, t), NOT_A_NUMBER, step * groups)) return false;
  }
  return true;
}

// What sequences see from a column on (`first` [batch], or all) and queries before one (`end` [queries], or one), as a
// mask over tokens from column `start` on. Tokens that no query sees are cut off.
std::optional<at::Tensor> mask_of(const std::optional<at::Tensor>& first, const std::optional<at::Tensor>& end,
                                  int64_t start, int64_t batch, int64_t queries, int64_t& tokens) {
  if (!first && !end) return {};
  const auto numbers = [&](const std::optional<at::Tensor>& x, int64_t otherwise, int64_t count) {
    std::vector<int64_t> found{otherwise};
    if (x) {
      TORCH_CHECK(x->numel() == 1 || x->numel() == count, "first needs a column for each sequence, end for each query");
      const at::Tensor flat = x->to(at::kLong).contiguous();
      found.assign(flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel());
    }
    for (int64_t& n : found) n = std::clamp<int64_t>(n - start, 0, tokens);
    return found;
  };
  const auto firsts = numbers(first, start, batch), ends = numbers(end, start + tokens, queries);
  tokens = *std::max_element(ends.begin(), ends.end());
  const int64_t rows = firsts.size(), columns = ends.size();
  at::Tensor mask = at::zeros({rows, 1, columns, tokens}, at::kBool);
  for (int64_t b = 0; b < rows; ++b)
    for (int64_t i = 0; i < columns; ++i) {
      bool* row = mask.mutable_data_ptr<bool>() + (b * columns + i) * tokens;
      if (firsts[b] < ends[i]) std::fill(row + firsts[b], row + ends[i], true);
    }
  return mask.expand({rows, 1, queries, tokens});
}

// Attention of all queries; `limits`: tokens of each sequence, or nothing where all have as many; `recent`: keys and
// values as they are, or nothing.
std::tuple<at::Tensor, at::Tensor> attend_to(
    const at::Tensor& q, const Stored& k, const Stored& v, int64_t tokens, const std::vector<int64_t>& limits,
    const std::optional<at::Tensor>& mask, double scale, at::TensorList recent,
    const std::optional<at::Tensor>& recent_mask) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), kv_heads = k.heads();
  const int64_t groups = heads / kv_heads, rows = groups * queries, workers = batch * kv_heads;

  const auto side_by_side = [](const std::optional<at::Tensor>& m) {
    return m && m->stride(3) != 1 ? std::optional(m->contiguous()) : m;
  };
  const auto seen = side_by_side(mask), recent_seen = side_by_side(recent_mask);
  Side history(k, v, view_of(seen), tokens, workers, rows);
  history.limits = limits;
  std::vector<at::Tensor> dense;
  for (const at::Tensor& t : recent) dense.push_back(with_dense_rows(t));
  std::optional<Stored> recent_k, recent_v;
  std::optional<Side> beside;
  if (!dense.empty()) {
    const at::Tensor none = at::empty({0}, q.options());
    recent_k.emplace(stored_of({none, dense[0], none, none}, {0, k.d, 16}, none));
    recent_v.emplace(stored_of({none, dense[1], none, none}, {0, v.d, 16}, none));
    beside.emplace(*recent_k, *recent_v, view_of(recent_seen), dense[0].size(2), workers, rows);
  }

  const at::Tensor wide = q.to(at::kFloat).contiguous();
  std::vector<char> finite(workers * rows, true);  // of the others, integers would make numbers
  at::parallel_for(0, workers * rows, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = wide.const_data_ptr<float>() + row * k.d;
      float mixed[MAX_DIM];
      std::copy_n(x, k.d, mixed);
      k.mix(row / rows % kv_heads).apply(mixed);
      const auto fits = [&](float c) { return std::isfinite(c * static_cast<float>(scale)); };
      finite[row] = std::all_of(x, x + k.d, fits) && std::all_of(mixed, mixed + k.d, fits);
      if (!finite[row]) continue;
      if (beside) beside->query(row, x, static_cast<float>(scale));
      history.query(row, mixed, static_cast<float>(scale));
    }
  });
  std::vector<std::unique_ptr<const Coded>> coded(kv_heads);  // of the first head of those in one pair of runs
  std::vector<const Coded*> coded_of(kv_heads);
  for (int64_t h = 0; h < kv_heads && rows <= MOST_ROWS; ++h) {
    const bool same = h && k.of_head[h] == k.of_head[h - 1] && v.of_head[h] == v.of_head[h - 1];
    if (!same && Coded::reads(k.source(h), v.source(h)))
      coded[h] = std::make_unique<const Coded>(k.source(h), v.source(h), q.scalar_type() == at::kFloat);
    coded_of[h] = same ? coded_of[h - 1] : coded[h].get();
  }
  const auto run = [&](Side& side, bool packed, int64_t i) {
    const int64_t worker = i / side.splits, b = worker / kv_heads, h = worker % kv_heads, limit = side.limit(b);
    const int64_t begin = std::min(i % side.splits * side.stretch, limit), end = std::min(begin + side.stretch, limit);
    const Source &keys = side.k.source(h), &values = side.v.source(h);
    const int64_t k_width = rounded_up(keys.used, CHUNK), v_width = rounded_up(values.used, CHUNK);
    const float* query = side.queries_of(worker);
    float *out = side.outs_of(i), *peak = side.peaks.data() + i * rows;
    const Stretch stretch{keys, values, side.mask, query, b, h, rows, groups, queries, out, peak, side.totals.data() + i * rows};
    const Coded* codes = packed ? coded_of[h] : nullptr;
    // Codes that are no numbers are read as floats: sums of integers would make numbers of them.
    if (!codes || !all_numbers(keys, b, h, begin, end) || !all_numbers(values, b, h, begin, end))
      return stretch.run(begin, end);
    for (int64_t r = 0; r < rows; r += Coded::ROWS) {
      const int64_t count = std::min(rows - r, Coded::ROWS);
      const bool* seen[Coded::ROWS] = {};
      for (int64_t n = 0; n < count; ++n) seen[n] = stretch.seen_by(r + n);
      codes->attend(query + r * k_width, count, b, h, begin, end, seen, out + r * v_width, peak + r, stretch.total + r);
    }
  };
  const int64_t parts = workers * history.splits, others = beside ? workers * beside->splits : 0;
  const int64_t items = std::max(parts, others);  // threads take neighbours: each its share of both
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = parts * begin / items; i < parts * end / items; ++i) run(history, true, i);
    for (int64_t i = others * begin / items; i < others * end / items; ++i) run(*beside, false, i);
  });

  // Merged by log-sum-exp; the history in the coordinates in which it is stored.
  at::Tensor out = at::zeros({batch, heads, queries, v.d}, q.options().dtype(at::kFloat));
  at::Tensor lse = at::full({batch, heads, queries}, NOTHING, q.options().dtype(at::kFloat));
  auto *to = out.mutable_data_ptr<float>(), *lse_to = lse.mutable_data_ptr<float>();
  at::parallel_for(0, workers * rows, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!finite[row]) {
        std::fill_n(to + row * v.d, v.d, NAN);
        lse_to[row] = NAN;
        continue;
      }
      const float most = std::max(history.peak(row), beside ? beside->peak(row) : NOTHING);
      if (most == NOTHING) {  // sees nothing, or infinities only
        const int64_t b = row / queries / heads, head = row / queries % heads, query = row % queries;
        if (!history.seen(b, head, query) && !(beside && beside->seen(b, head, query))) continue;
        std::fill_n(to + row * v.d, v.d, NAN);
        lse_to[row] = NAN;
        continue;
      }
      std::vector<float> sums(v.d);
      float total = history.add(row, most, sums.data());
      v.mix(row / rows % kv_heads).undo(sums.data());
      if (beside) total += beside->add(row, most, sums.data());
      for (int64_t c = 0; c < v.d; ++c) to[row * v.d + c] = sums[c] / total;
      lse_to[row] = most + std::log(total);
    }
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor> attend(
    const at::Tensor& q, at::TensorList k_planes, at::IntArrayRef k_layout, at::TensorList v_planes,
    at::IntArrayRef v_layout, int64_t tokens, const std::optional<at::Tensor>& given, double scale, at::TensorList mixes,
    at::TensorList recent, const std::optional<at::Tensor>& recent_mask, const std::optional<at::Tensor>& first,
    const std::optional<at::Tensor>& end, int64_t start) {
  const Stored k = stored_of(k_planes, k_layout, mixes.slice(0, runs_in(k_layout)));
  const Stored v = stored_of(v_planes, v_layout, mixes.slice(runs_in(k_layout)));
  check(q, k, v, k_planes, v_planes, q.size(0), tokens, given, recent, recent_mask);
  TORCH_CHECK(!given || (!first && !end), "give a mask, or numbers");
  const auto mask = given ? given : mask_of(first, end, start, q.size(0), q.size(2), tokens);
  return attend_to(q, k, v, tokens, {}, mask, scale, recent, recent_mask);
}

// Of sequences in pages: planes [pages, heads, tokens of a page, width]; table [batch, pages of a sequence]; query i of
// sequence b sees the packed tokens from `first` to before ends[b][i].
std::tuple<at::Tensor, at::Tensor> attend_pages(
    const at::Tensor& q, at::TensorList k_planes, at::IntArrayRef k_layout, at::TensorList v_planes,
    at::IntArrayRef v_layout, const at::Tensor& table, int64_t first, const at::Tensor& ends, double scale,
    at::TensorList mixes, at::TensorList recent, const std::optional<at::Tensor>& recent_mask) {
  Stored k = stored_of(k_planes, k_layout, mixes.slice(0, runs_in(k_layout)));
  Stored v = stored_of(v_planes, v_layout, mixes.slice(runs_in(k_layout)));
  const at::Tensor& keys = any_of(k_planes);
  const int64_t batch = q.size(0), queries = q.size(2), page = keys.size(2);
  TORCH_CHECK(page % PAGE == 0 && (page & (page - 1)) == 0, "pages hold a power of two of tokens, ", PAGE, " or more");
  TORCH_CHECK(table.dim() == 2 && table.size(0) == batch && ends.dim() == 2 && ends.size(0) == batch &&
                  ends.size(1) == queries && table.scalar_type() == at::kLong && ends.scalar_type() == at::kLong,
              "expected table [batch, pages] and ends [batch, queries] of int64");
  const at::Tensor numbers = table.contiguous(), seen = ends.contiguous();
  const int64_t *number = numbers.const_data_ptr<int64_t>(), *before = seen.const_data_ptr<int64_t>();
  TORCH_CHECK(batch && queries && first >= 0, "there is no query, or a token before the first");
  std::vector<int64_t> limits(batch, 0);  // what lies behind the end of a sequence in its last page may be anything
  for (int64_t i = 0; i < batch * queries; ++i) limits[i / queries] = std::max(limits[i / queries], before[i]);
  const int64_t tokens = *std::max_element(limits.begin(), limits.end());
  TORCH_CHECK(tokens <= table.size(1) * page, "queries see more tokens than there are pages for");
  check(q, k, v, k_planes, v_planes, keys.size(0), page, {}, recent, recent_mask);
  at::Tensor mask = at::zeros({batch, 1, queries, tokens}, at::kBool);
  for (int64_t i = 0; i < batch * queries; ++i) {
    const int64_t count = std::max<int64_t>(before[i], 0);
    bool* row = mask.mutable_data_ptr<bool>() + i * tokens;
    if (first < count) std::fill(row + first, row + count, true);
    for (int64_t p = 0; p * page < count; ++p) {
      const int64_t each = number[i / queries * table.size(1) + p];
      TORCH_CHECK(each >= 0 && each < keys.size(0), "page ", each, " of ", keys.size(0));
    }
  }
  int bits = 0;
  while (page >> bits > 1) ++bits;
  const Pages pages{number, table.size(1), table.size(1) - 1, bits};
  if (tokens) {  // else there may be no page
    for (Stored* side : {&k, &v})
      for (Stored::Run& run : side->runs) run.source.put_in_pages(pages);
  }
  return attend_to(q, k, v, tokens, limits, mask, scale, recent, recent_mask);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(swan, m) {
  m.def(
      SWAN_OPERATOR(attend_cpu)
      "(Tensor q, Tensor[] k, int[] k_layout, Tensor[] v, int[] v_layout, SymInt tokens, Tensor? mask, "
      "float scale, Tensor[] mixes, Tensor[] recent, Tensor? recent_mask, Tensor? first, Tensor? end, SymInt start) "
      "-> (Tensor, Tensor)");
  m.def(
      SWAN_OPERATOR(attend_pages_cpu)
      "(Tensor q, Tensor[] k, int[] k_layout, Tensor[] v, int[] v_layout, Tensor table, int first, Tensor ends, float scale, "
      "Tensor[] mixes, Tensor[] recent, Tensor? recent_mask) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swan, CPU, m) {
  m.impl(SWAN_OPERATOR(attend_cpu), &attend);
  m.impl(SWAN_OPERATOR(attend_pages_cpu), &attend_pages);
}
