// Rounding to bfloat16 and selection of the k largest pre-activations `h` of each vector.
// `native.py` documents the functions.

#include <cmath>
#include <memory>

#include "order.h"
#include "rows.h"

namespace {

constexpr int64_t kGroupsPerK = 16;
constexpr int64_t kRowsAtATime = 8;
constexpr int64_t kRowsPerTile = 256;

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
