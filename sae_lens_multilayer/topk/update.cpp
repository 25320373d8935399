// One step of Adam for all rows of a matrix of weights. `update.py` documents it.

#include <cmath>

#include "rows.h"

namespace {

struct Rates {
  float average, keep_square, square, step, root, eps;
};

// Removes from gradient [d] the component along a row of unit norm.
void project(const float *row, int64_t d, float *gradient) {
  float along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t i = 0; i < d; ++i)
    along += gradient[i] * row[i];
#pragma omp simd
  for (int64_t i = 0; i < d; ++i)
    gradient[i] -= along * row[i];
}

// Updates a row and clears its gradient; returns the squared norm of the row.
float step(float *row, float *gradient, float *average, float *square, int64_t d,
           Rates rates) {
  float squared_norm = 0;
#pragma omp simd reduction(+ : squared_norm)
  for (int64_t i = 0; i < d; ++i) {
    const float g = gradient[i];
    const float m = average[i] + rates.average * (g - average[i]);
    const float v = rates.keep_square * square[i] + rates.square * g * g;
    const float w = row[i] - rates.step * m / (std::sqrt(v) * rates.root + rates.eps);
    average[i] = m;
    square[i] = v;
    row[i] = w;
    gradient[i] = 0;
    squared_norm += w * w;
  }
  return squared_norm;
}

}  // namespace

extern "C" {

void adam_step(float *rows, float *gradients, float *averages, float *squares,
               int64_t n_rows, int64_t d, const float *rates, int64_t unit_norm,
               int threads) {
  const Rates of = {rates[0], rates[1], rates[2], rates[3], rates[4], rates[5]};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < n_rows * d; first += d) {
    float *row = rows + first, *gradient = gradients + first;
    if (unit_norm)
      project(row, d, gradient);
    const float squared_norm = step(row, gradient, averages + first, squares + first, d, of);
    if (unit_norm && squared_norm != 0) {
      const float scale = 1 / std::sqrt(squared_norm);
#pragma omp simd
      for (int64_t i = 0; i < d; ++i)
        row[i] *= scale;
    }
  }
}

}  // extern "C"
