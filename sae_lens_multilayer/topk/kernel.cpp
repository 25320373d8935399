// Rounding to bfloat16 and selection of the k largest pre-activations `h` of each vector.
// `native.py` documents the functions.
//
// The k-th largest number is found bit by bit, from the highest to the lowest: each step
// counts the numbers >= a threshold, in vector instructions without branches.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kGroupsPerK = 16;
constexpr int64_t kRowsAtATime = 8;
constexpr int64_t kDotsAtATime = 4;

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

// Products of x with four rows of w at once, since a single one would wait for memory.
void dots(const float *x, const float *w, int64_t d, const int64_t *rows, float *out) {
  const float *w0 = w + rows[0] * d, *w1 = w + rows[1] * d;
  const float *w2 = w + rows[2] * d, *w3 = w + rows[3] * d;
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t i = 0; i < d; ++i) {
    s0 += x[i] * w0[i];
    s1 += x[i] * w1[i];
    s2 += x[i] * w2[i];
    s3 += x[i] * w3[i];
  }
  out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

// The numbers of one row, in groups: number i belongs to group i % n_groups.
template <typename Bits>
class Row {
 public:
  using T = Order<Bits>;

  // Returns the k-th largest group maximum: at least k numbers are >= it.
  T read(const Bits *h, int64_t n, int64_t k) {
    h_ = h;
    n_ = n;
    n_groups_ = std::min(n, kGroupsPerK * k);
    // With a power of two, a group's numbers would evict each other from the cache.
    if (n_groups_ < n)
      n_groups_ = std::min(n, (n_groups_ / 64 * 2 + 1) * 32);
    maxima_.resize(n_groups_);
    T *maxima = maxima_.data();
    for (int64_t g = 0; g < n_groups_; ++g)
      maxima[g] = order_of(h[g]);
    for (int64_t start = n_groups_; start < n; start += n_groups_) {
      const int64_t width = std::min(n_groups_, n - start);
      for (int64_t g = 0; g < width; ++g)
        maxima[g] = std::max(maxima[g], order_of(h[start + g]));
    }
    return kth_largest(maxima, n_groups_, k);
  }

  // Returns the indices of all numbers >= a threshold.
  const std::vector<int64_t> &indices_from(T threshold) {
    indices_.clear();
    for (int64_t g = 0; g < n_groups_; ++g)
      if (maxima_[g] >= threshold)
        for (int64_t i = g; i < n_; i += n_groups_)
          if (order_of(h_[i]) >= threshold)
            indices_.push_back(i);
    return indices_;
  }

 private:
  const Bits *h_ = nullptr;
  int64_t n_ = 0, n_groups_ = 0;
  std::vector<T> maxima_;
  std::vector<int64_t> indices_;
};

// Writes the k largest numbers and their indices, given all numbers and their indices.
void keep_largest(const std::vector<int32_t> &orders,
                  const std::vector<int64_t> &indices, int64_t k, float *kept,
                  int64_t *kept_indices) {
  const int64_t n = orders.size();
  const int32_t threshold = kth_largest(orders.data(), n, k);
  int64_t n_kept = 0;
  const auto keep = [&](int64_t i) {
    kept[n_kept] = float_of(orders[i]);
    kept_indices[n_kept++] = indices[i];
  };
  for (int64_t i = 0; i < n; ++i)
    if (orders[i] > threshold)
      keep(i);
  for (int64_t i = 0; i < n && n_kept < k; ++i)
    if (orders[i] == threshold)
      keep(i);
}

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

void largest_positive(const uint32_t *h, int64_t n_rows, int64_t stride, int64_t n,
                      int64_t k, float *values, int64_t *indices, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Row<uint32_t> row;
    std::vector<int32_t> orders;
#pragma omp for schedule(dynamic, kRowsAtATime)
    for (int64_t r = 0; r < n_rows; ++r) {
      const uint32_t *from = h + r * stride;
      const auto &found = row.indices_from(row.read(from, n, k));
      orders.clear();
      for (const int64_t i : found)
        orders.push_back(order_of(from[i]));
      keep_largest(orders, found, k, values + r * k, indices + r * k);
    }
  }
}

void certified_topk(const uint16_t *h, int64_t n_rows, int64_t stride, int64_t n,
                    const float *errors, const float *x, const float *w, int64_t d,
                    int64_t k, float *values, int64_t *indices, bool *proven,
                    int threads) {
#pragma omp parallel num_threads(threads)
  {
    Row<uint16_t> row;
    std::vector<int32_t> orders;
#pragma omp for schedule(dynamic, kRowsAtATime)
    for (int64_t r = 0; r < n_rows; ++r) {
      const uint32_t kth = row.read(h + r * stride, n, k);
      // Twice the error: the rounding of the stored product (2^-8 of it), and `errors`.
      const float bound = float_of(kth << 16) * (1 - 0x1p-7f) - 2 * errors[r];
      proven[r] = false;
      std::fill_n(values + r * k, k, 0.0f);
      std::fill_n(indices + r * k, k, 0);
      if (!(bound > 0))
        continue;
      const auto &found = row.indices_from(std::max(bits_of(bound) >> 16, 1u));
      const int64_t n_found = found.size();
      if (n_found > 4 * k + 64)
        continue;
      orders.resize(n_found);
      for (int64_t i = 0; i < n_found; i += kDotsAtATime) {
        int64_t rows[kDotsAtATime];
        float products[kDotsAtATime];
        for (int64_t j = 0; j < kDotsAtATime; ++j)
          rows[j] = found[std::min(i + j, n_found - 1)];
        dots(x + r * d, w, d, rows, products);
        for (int64_t j = 0; j < kDotsAtATime && i + j < n_found; ++j)
          orders[i + j] = order_of(bits_of(products[j]));
      }
      keep_largest(orders, found, k, values + r * k, indices + r * k);
      proven[r] = true;
    }
  }
}

}  // extern "C"
