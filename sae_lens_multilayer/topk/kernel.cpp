// Rounding to bfloat16 and selection of the k largest pre-activations `h` of each vector.
// `native.py` documents the functions.
//
// The k-th largest number is found bit by bit, from the highest to the lowest: each step
// counts the numbers >= a threshold, in vector instructions without branches.

#include <cmath>
#include <limits>
#include <memory>

#include "rows.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kGroupsPerK = 16;
constexpr int64_t kRowsAtATime = 8;
constexpr int64_t kRowsPerTile = 256;

// Maps numbers to integers of the same order; numbers at or below 0 become 0. A float32
// NaN of either sign becomes the largest. A bfloat16 NaN needs no care: its row's error
// bound is NaN, so the row is not proven.
int16_t order_of(uint16_t bits) {
  return std::max<int16_t>(static_cast<int16_t>(bits), 0);
}

int32_t order_of(uint32_t bits) {
  const int32_t nan = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : 0;
  return std::max(std::max<int32_t>(static_cast<int32_t>(bits), 0), nan);
}

template <typename Bits>
using Order = decltype(order_of(Bits()));

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest, ties to even.
uint16_t bfloat16_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return value != value ? 0x7fc0 : nearest;
}

template <typename T>
int64_t count_from(const T *x, int64_t n, T threshold) {
  // The counter has the width of T, so that a register holds as many counters as
  // numbers; pieces are short enough that it cannot overflow.
  constexpr int64_t piece = std::numeric_limits<int16_t>::max();
  int64_t total = 0;
  for (int64_t start = 0; start < n; start += piece) {
    const int64_t end = std::min(n, start + piece);
    T count = 0;
    for (int64_t i = start; i < end; ++i)
      count += static_cast<T>(x[i] >= threshold);
    total += count;
  }
  return total;
}

// The k-th largest of n numbers >= 0.
template <typename T>
T kth_largest(const T *x, int64_t n, int64_t k) {
  T found = 0;
  for (int bit = std::numeric_limits<T>::digits - 1; bit >= 0; --bit) {
    const T next = static_cast<T>(found | (T(1) << bit));
    if (count_from(x, n, next) >= k)
      found = next;
  }
  return found;
}

constexpr int64_t kAtATime = 16;

// Which of 16 numbers have an order >= a threshold, as bits.
template <typename Bits>
uint32_t which_from(const Bits *h, Order<Bits> threshold) {
  uint32_t which = 0;
  for (int64_t i = 0; i < kAtATime; ++i)
    which |= uint32_t(order_of(h[i]) >= threshold) << i;
  return which;
}

#if defined(__AVX2__)
template <>
uint32_t which_from(const uint16_t *h, int16_t threshold) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(h));
  const __m256i order = _mm256_max_epi16(bits, _mm256_setzero_si256());
  const __m256i is_less = _mm256_cmpgt_epi16(_mm256_set1_epi16(threshold), order);
  const __m128i low = _mm256_castsi256_si128(is_less);
  const __m128i high = _mm256_extracti128_si256(is_less, 1);
  return 0xffff & ~_mm_movemask_epi8(_mm_packs_epi16(low, high));
}

template <>
uint32_t which_from(const uint32_t *h, int32_t threshold) {
  uint32_t which = 0;
  for (int64_t i = 0; i < kAtATime; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(h + i));
    const __m256i size = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    const __m256i is_nan = _mm256_cmpgt_epi32(size, _mm256_set1_epi32(0x7f800000));
    const __m256i order = _mm256_max_epi32(bits, _mm256_setzero_si256());
    const __m256i is_less = _mm256_cmpgt_epi32(_mm256_set1_epi32(threshold), order);
    const __m256i is_not = _mm256_andnot_si256(is_nan, is_less);
    which |= (0xff & ~_mm256_movemask_ps(_mm256_castsi256_ps(is_not))) << i;
  }
  return which;
}
#endif

// Writes start + i for each bit i that is set, of at most 16; returns the end. There must
// be space for 16.
int32_t *write_indices(uint32_t which, int32_t start, int32_t *to) {
#if defined(__AVX512F__)
  const __m512i all = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i indices = _mm512_add_epi32(all, _mm512_set1_epi32(start));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(which, indices));
  return to + __builtin_popcount(which);
#else
  for (; which != 0; which &= which - 1)
    *to++ = start + __builtin_ctz(which);
  return to;
#endif
}

// Writes the indices of all of n numbers with an order >= a threshold, which ascend;
// returns their end. There must be space for n + 16.
template <typename Bits>
int32_t *write_indices_from(const Bits *h, int64_t n, Order<Bits> threshold,
                            int32_t *to) {
  int64_t start = 0;
  for (; start + kAtATime <= n; start += kAtATime)
    if (const uint32_t which = which_from(h + start, threshold))
      to = write_indices(which, start, to);
  for (; start < n; ++start)
    if (order_of(h[start]) >= threshold)
      *to++ = start;
  return to;
}

// Indices of some numbers of a row.
struct Found {
  const int32_t *begin, *end;
  int64_t size() const { return end - begin; }
};

// The numbers of one row, in groups: number i belongs to group i % n_groups.
template <typename Bits>
class Row {
 public:
  using T = Order<Bits>;

  // Returns the k-th largest group maximum: at least k numbers are >= it.
  T read(const Bits *h, int64_t n, int64_t k) {
    h_ = h;
    n_ = n;
    int64_t n_groups = std::min(n, kGroupsPerK * k);
    // With a power of two, a group's numbers would evict each other from the cache.
    if (n_groups < n)
      n_groups = std::min(n, (n_groups / 64 * 2 + 1) * 32);
    maxima_.resize(n_groups);
    T *maxima = maxima_.data();
    for (int64_t g = 0; g < n_groups; ++g)
      maxima[g] = order_of(h[g]);
    for (int64_t start = n_groups; start < n; start += n_groups) {
      const int64_t width = std::min(n_groups, n - start);
      for (int64_t g = 0; g < width; ++g)
        maxima[g] = std::max(maxima[g], order_of(h[start + g]));
    }
    return kth_largest(maxima, n_groups, k);
  }

  // Returns the indices of all numbers >= a threshold, which ascend.
  Found indices_from(T threshold) {
    if (static_cast<int64_t>(indices_.size()) < n_ + kAtATime)
      indices_.resize(n_ + kAtATime);
    int32_t *const begin = indices_.data();
    return {begin, write_indices_from(h_, n_, threshold, begin)};
  }

 private:
  const Bits *h_ = nullptr;
  int64_t n_ = 0;
  std::vector<T> maxima_;
  std::vector<int32_t> indices_;
};

// Some columns of a row; all of them if there are no indices.
template <typename Bits>
class Columns {
 public:
  Columns(const int64_t *indices, int64_t n)
      : indices_(indices), n_(n), gathered_(indices == nullptr ? 0 : n) {}

  const Bits *of(const Bits *row) {
    if (indices_ == nullptr)
      return row;
    for (int64_t i = 0; i < n_; ++i)
      gathered_[i] = row[indices_[i]];
    return gathered_.data();
  }

 private:
  const int64_t *indices_;
  int64_t n_;
  std::vector<Bits> gathered_;
};

// Writes the k largest of n numbers and their indices, in the order given.
void keep_largest(const int32_t *orders, const int32_t *indices, int64_t n, int64_t k,
                  float *kept, int64_t *kept_indices) {
  const int32_t threshold = kth_largest(orders, n, k);
  int64_t n_larger = 0;
  for (int64_t i = 0; i < n; ++i)
    n_larger += orders[i] > threshold;
  int64_t n_kept = 0, n_equal = k - n_larger;
  for (int64_t i = 0; i < n && n_kept < k; ++i) {
    // Without branches, since about as many are kept as not.
    const bool is_equal = orders[i] == threshold;
    kept[n_kept] = float_of(orders[i]);
    kept_indices[n_kept] = indices[i];
    n_kept += (orders[i] > threshold) | (is_equal & (n_equal > 0));
    n_equal -= is_equal;
  }
}

// Entries of some rows that may belong to the k largest; none for a row without proof.
class Candidates {
 public:
  Candidates(int64_t n_rows, int64_t k)
      : limit_(4 * k + 64), starts_(n_rows), ends_(n_rows),
        columns_(new int32_t[n_rows * limit_]), orders_(new int32_t[n_rows * limit_]) {}

  // Finds those of row r, given its approximate numbers h. Their errors are at most half
  // of `twice_error`, apart from the rounding of the stored number (2^-8 of it).
  void find(int64_t r, Row<uint16_t> &row, const uint16_t *h, int64_t n, int64_t k,
            float twice_error) {
    starts_[r] = ends_[r] = r * limit_;
    const uint32_t kth = row.read(h, n, k);
    const float bound = float_of(kth << 16) * (1 - 0x1p-7f) - twice_error;
    if (!(bound > 0))
      return;
    const Found found = row.indices_from(std::max(bits_of(bound) >> 16, 1u));
    if (found.size() > limit_)
      return;
    ends_[r] = std::copy(found.begin, found.end, &columns_[starts_[r]]) - &columns_[0];
  }

  // Computes the float32 numbers of all candidates of n_rows rows.
  void multiply(int64_t n_rows, int64_t n, const float *x, const float *w, int64_t d,
                int threads) {
    const int32_t *columns = columns_.get();
    int32_t *orders = orders_.get();
    const auto visit = [=](int64_t r, int64_t first, int64_t end) {
      row_dots(x + r * d, w, d, columns + first, end - first, [=](int64_t i, float dot) {
        orders[first + i] = order_of(bits_of(dot));
      });
    };
    visit_blocks(starts_.data(), ends_.data(), columns, n_rows, n, d, threads, visit);
  }

  // Writes the k largest of row r; returns whether the row is proven.
  bool keep(int64_t r, int64_t k, float *values, int64_t *indices) const {
    std::fill_n(values, k, 0.0f);
    std::fill_n(indices, k, 0);
    const int64_t first = starts_[r], n_found = ends_[r] - first;
    if (n_found == 0)
      return false;
    keep_largest(&orders_[first], &columns_[first], n_found, k, values, indices);
    return true;
  }

 private:
  int64_t limit_;
  std::vector<int64_t> starts_, ends_;
  std::unique_ptr<int32_t[]> columns_, orders_;
};

}  // namespace

extern "C" {

void round_rows(const float *x, int64_t n_rows, int64_t d, uint16_t *rounded,
                float *norms, float *errors, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < n_rows; ++r) {
    float squares = 0, squared_error = 0;
#pragma omp simd reduction(+ : squares, squared_error)
    for (int64_t i = r * d; i < (r + 1) * d; ++i) {
      rounded[i] = bfloat16_of(x[i]);
      const float error = x[i] - float_of(uint32_t(rounded[i]) << 16);
      squares += x[i] * x[i];
      squared_error += error * error;
    }
    norms[r] = std::sqrt(squares);
    errors[r] = std::sqrt(squared_error);
  }
}

void largest_positive(const uint32_t *h, int64_t n_rows, int64_t stride,
                      const int64_t *latents, int64_t n, int64_t k, float *values,
                      int64_t *indices, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Row<uint32_t> row;
    Columns<uint32_t> columns(latents, n);
    std::vector<int32_t> orders;
#pragma omp for schedule(dynamic, kRowsAtATime)
    for (int64_t r = 0; r < n_rows; ++r) {
      const uint32_t *from = columns.of(h + r * stride);
      const Found found = row.indices_from(row.read(from, n, k));
      orders.clear();
      for (const int32_t *i = found.begin; i < found.end; ++i)
        orders.push_back(order_of(from[*i]));
      keep_largest(orders.data(), found.begin, found.size(), k, values + r * k,
                   indices + r * k);
    }
  }
}

void certified_topk(const uint16_t *h, int64_t n_rows, int64_t stride,
                    const int64_t *latents, int64_t n, const float *errors,
                    const float *x, const float *w, int64_t d, int64_t k, float *values,
                    int64_t *indices, bool *proven, int threads) {
  Candidates candidates(std::min(kRowsPerTile, n_rows), k);
  for (int64_t start = 0; start < n_rows; start += kRowsPerTile) {
    const int64_t n_tile = std::min(kRowsPerTile, n_rows - start);
#pragma omp parallel num_threads(threads)
    {
      Row<uint16_t> row;
      Columns<uint16_t> columns(latents, n);
#pragma omp for schedule(dynamic, kRowsAtATime)
      for (int64_t r = 0; r < n_tile; ++r)
        candidates.find(r, row, columns.of(h + (start + r) * stride), n, k,
                        2 * errors[start + r]);
    }
    candidates.multiply(n_tile, n, x + start * d, w, d, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, kRowsAtATime)
    for (int64_t r = 0; r < n_tile; ++r)
      proven[start + r] = candidates.keep(r, k, values + (start + r) * k,
                                          indices + (start + r) * k);
  }
}

}  // extern "C"
