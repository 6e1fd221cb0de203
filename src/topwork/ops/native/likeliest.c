// The K largest of each row x [V], in order, and where they stand; the first of equal ones first.
// With `normalise` they are log-probabilities: less the logarithm of the sum of the row's
// exponentials. Where a number of a row is not one, neither are its values.
//
// A first pass keeps the largest of each stretch, so that later few stretches are looked at.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
enum { STRETCH = 256 };

static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float whole = rintf(x * 1.44269504f);
  float f = x * 1.44269504f - whole;
  float p = 1.5252734e-5f;
  p = p * f + 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const int32_t bits = ((int32_t)whole + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return x > -87.0f ? p * scale : 0.0f;
}

static float largest(const float *x, i64 n, int *odd) {
  float top = -INFINITY;
  int strange = 0;
#pragma omp simd reduction(max : top) reduction(| : strange)
  for (i64 i = 0; i < n; i++) {
    strange |= x[i] != x[i];
    top = x[i] > top ? x[i] : top;
  }
  *odd |= strange;
  return top;
}

static double whole(const float *x, i64 V, float top) {
  double total = 0;
  for (i64 from = 0; from < V; from += STRETCH) {
    const i64 to = from + STRETCH < V ? from + STRETCH : V;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 i = from; i < to; i++) sum += exponential(x[i] - top);
    total += sum;
  }
  return total;
}

static void row(const float *x, float *values, i64 *ids, i64 V, i64 K, i64 normalise,
                float *tops) {
  float top = -INFINITY;
  int odd = 0;
  for (i64 from = 0, s = 0; from < V; from += STRETCH, s++) {
    tops[s] = largest(x + from, from + STRETCH < V ? STRETCH : V - from, &odd);
    top = tops[s] > top ? tops[s] : top;
  }
  i64 held = 0;
  for (i64 from = 0, s = 0; from < V; from += STRETCH, s++) {
    if (held == K && !(tops[s] > values[K - 1])) continue;
    for (i64 i = from; i < from + STRETCH && i < V; i++) {
      if (held == K && !(x[i] > values[K - 1])) continue;
      i64 at = held < K ? held++ : K - 1;
      for (; at > 0 && x[i] > values[at - 1]; at--) values[at] = values[at - 1], ids[at] = ids[at - 1];
      values[at] = x[i], ids[at] = i;
    }
  }
  const float shift = normalise ? (float)log(whole(x, V, top)) : 0.0f;
  for (i64 k = 0; k < K; k++) {
    if (normalise) values[k] = values[k] - top - shift;
    if (odd) values[k] = NAN;
  }
}

// values [N, K], ids [N, K] of x [N, V]; tops [N, V / STRETCH + 1] to work with
void topwork_likeliest(const float *x, float *values, i64 *ids, float *tops, i64 N, i64 V, i64 K,
                       i64 normalise) {
#pragma omp parallel for schedule(static, 1) if (N > 1)
  for (i64 n = 0; n < N; n++)
    row(x + n * V, values + n * K, ids + n * K, V, K, normalise, tops + n * (V / STRETCH + 1));
}
