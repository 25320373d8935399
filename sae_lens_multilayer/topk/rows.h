// Sums and dot products of dense float32 rows, in vector registers.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
constexpr int64_t kRegisters = 8, kFewRegisters = 4, kQuarter = 4;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef float Quarter __attribute__((vector_size(kQuarter * sizeof(float))));

constexpr int64_t kDotsAtATime = 4;
// Dense rows that are read again and again should stay in the second-level cache.
constexpr int64_t kCachedFloats = 1 << 17;
// Fewer entries of a row in a block of columns do not pay for visiting the row.
constexpr int64_t kEntriesPerVisit = 16;
constexpr int64_t kRowsAhead = 4;

Vector load(const float *from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

float sum(Vector v) {
  Quarter quarters[kLanes / kQuarter];
  std::memcpy(quarters, &v, sizeof v);
  for (int64_t i = 1; i < kLanes / kQuarter; ++i)
    quarters[0] += quarters[i];
  return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

// Adds n vectors of each weighted row of x to `out`.
template <int64_t n>
void add_vectors(const int32_t *rows, const float *weights, int64_t n_rows,
                 const float *x, int64_t d, float *out) {
  Vector sums[n];
  for (int64_t i = 0; i < n; ++i)
    sums[i] = load(out + i * kLanes);
  for (int64_t r = 0; r < n_rows; ++r)
    for (int64_t i = 0; i < n; ++i)
      sums[i] += weights[r] * load(x + rows[r] * d + i * kLanes);
  for (int64_t i = 0; i < n; ++i)
    std::memcpy(out + i * kLanes, sums + i, sizeof(Vector));
}

// Adds weighted rows of x [?, d] to `out` [d].
void add_rows(const int32_t *rows, const float *weights, int64_t n_rows, const float *x,
              int64_t d, float *out) {
  int64_t i = 0;
  for (; i + kRegisters * kLanes <= d; i += kRegisters * kLanes)
    add_vectors<kRegisters>(rows, weights, n_rows, x + i, d, out + i);
  for (; i + kFewRegisters * kLanes <= d; i += kFewRegisters * kLanes)
    add_vectors<kFewRegisters>(rows, weights, n_rows, x + i, d, out + i);
  for (; i + kLanes <= d; i += kLanes)
    add_vectors<1>(rows, weights, n_rows, x + i, d, out + i);
  for (; i < d; ++i)
    for (int64_t r = 0; r < n_rows; ++r)
      out[i] += weights[r] * x[rows[r] * d + i];
}

// Dot products of x [d] with some rows of w [?, d], several at a time, since a single one
// would wait for memory.
template <typename Put>
void row_dots(const float *x, const float *w, int64_t d, const int32_t *rows,
              int64_t n_rows, Put put) {
  for (int64_t first = 0; first < n_rows; first += kDotsAtATime) {
    const float *of[kDotsAtATime];
    Vector sums[kDotsAtATime] = {};
    float rest[kDotsAtATime] = {};
    for (int64_t j = 0; j < kDotsAtATime; ++j)
      of[j] = w + rows[std::min(first + j, n_rows - 1)] * d;
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
      const Vector xi = load(x + i);
      for (int64_t j = 0; j < kDotsAtATime; ++j)
        sums[j] += xi * load(of[j] + i);
    }
    for (; i < d; ++i)
      for (int64_t j = 0; j < kDotsAtATime; ++j)
        rest[j] += x[i] * of[j][i];
    for (int64_t j = 0; j < kDotsAtATime; ++j)
      if (first + j < n_rows)
        put(first + j, sum(sums[j]) + rest[j]);
  }
}

// Calls visit(row, first entry, end) for the entries of each row of a sparse matrix. If
// rows are long, one block of columns after the other, so that the dense rows of a block
// are read from the cache; for this, columns ascend in each row. If they do not, each
// entry is still visited once.
template <typename Visit>
void visit_blocks(const int64_t *starts, const int64_t *ends, const int32_t *columns,
                  int64_t n_rows, int64_t n_columns, int64_t d, int threads,
                  Visit visit) {
  int64_t n_entries = 0;
  for (int64_t r = 0; r < n_rows; ++r)
    n_entries += ends[r] - starts[r];
  const int64_t per_visit = kEntriesPerVisit * std::max<int64_t>(1, n_rows);
  const int64_t n_blocks = std::max<int64_t>(
      1, std::min(n_columns * d / kCachedFloats, n_entries / per_visit));
  const int64_t width = (n_columns + n_blocks - 1) / n_blocks;
  std::vector<int64_t> next(starts, starts + n_rows);
  for (int64_t block = 1; block <= n_blocks; ++block) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t r = 0; r < n_rows; ++r) {
      __builtin_prefetch(columns + next[std::min(r + kRowsAhead, n_rows - 1)]);
      const int64_t first = next[r];
      int64_t end = block == n_blocks ? ends[r] : first;
      while (end < ends[r] && columns[end] < block * width)
        ++end;
      next[r] = end;
      if (end > first)
        visit(r, first, end);
    }
  }
}

}  // namespace
