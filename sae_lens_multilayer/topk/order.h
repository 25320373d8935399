// Numbers as integers of the same order: counting, the k-th largest, and the indices of
// those above a threshold, in vector instructions.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

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

// The k-th largest of n numbers >= 0, found bit by bit, from the highest to the lowest: each
// step counts the numbers >= a threshold, in vector instructions without branches.
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

}  // namespace
