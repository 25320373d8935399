// Products of sparse matrices with dense rows, in float32. `patterns.py` documents the
// functions.
//
// Entries of a sparse matrix are sorted by row: those of row r are starts[r] to
// starts[r + 1] - 1. Entry e is in column columns[e], and its number is values[at[e]].

#include "rows.h"

extern "C" {

void transpose_pattern(const int64_t *starts, const int32_t *columns, const int32_t *at,
                       int64_t n_rows, int64_t n_columns, int64_t *out_starts,
                       int32_t *out_columns, int32_t *out_at, int) {
  std::fill_n(out_starts, n_columns + 1, 0);
  for (int64_t e = 0; e < starts[n_rows]; ++e)
    ++out_starts[columns[e] + 1];
  for (int64_t c = 0; c < n_columns; ++c)
    out_starts[c + 1] += out_starts[c];
  std::vector<int64_t> next(out_starts, out_starts + n_columns);
  for (int64_t r = 0; r < n_rows; ++r)
    for (int64_t e = starts[r]; e < starts[r + 1]; ++e) {
      const int64_t to = next[columns[e]]++;
      out_columns[to] = r;
      out_at[to] = at[e];
    }
}

void add_product(const int64_t *starts, const int32_t *columns, const int32_t *at,
                 int64_t n_rows, int64_t n_columns, const float *values, const float *x,
                 int64_t d, float *out, int threads) {
  constexpr int64_t at_a_time = 64;
  const auto add = [=](int64_t r, int64_t first, int64_t end) {
    float *to = out + r * d;
    for (; first < end; first += at_a_time) {
      float weights[at_a_time];
      const int64_t n = std::min(at_a_time, end - first);
      for (int64_t i = 0; i < n; ++i)
        weights[i] = values[at[first + i]];
      add_rows(columns + first, weights, n, x, d, to);
    }
  };
  visit_blocks(starts, starts + 1, columns, n_rows, n_columns, d, threads, add);
}

void add_row_sums(const int64_t *starts, const int32_t *at, int64_t n_rows,
                  const float *values, float *out, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n_rows; ++r) {
    float sum = 0;
    for (int64_t e = starts[r]; e < starts[r + 1]; ++e)
      sum += values[at[e]];
    out[r] += sum;
  }
}

void sampled_product(const int64_t *starts, const int32_t *columns, const int32_t *at,
                     int64_t n_rows, int64_t n_columns, const float *x, const float *w,
                     int64_t d, float *out, int threads) {
  const auto multiply = [=](int64_t r, int64_t first, int64_t end) {
    row_dots(x + r * d, w, d, columns + first, end - first,
             [=](int64_t i, float dot) { out[at[first + i]] = dot; });
  };
  visit_blocks(starts, starts + 1, columns, n_rows, n_columns, d, threads, multiply);
}

}  // extern "C"
