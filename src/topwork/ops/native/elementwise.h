// Included once per type T by elementwise.c. N rows of width C; `n` elements in flat passes.

#define FLAT(n)                                                    \
  _Pragma("omp parallel for schedule(static)")                     \
  for (int64_t at = 0; at < n; at += BLOCK)                        \
    for (int64_t end = at + BLOCK < n ? at + BLOCK : n, go = 1; go; go = 0)

// y = silu(gate) up
void NAME(swiglu)(const T *gate, const T *up, T *y, int64_t n) {
  FLAT(n) {
#pragma omp simd
    for (int64_t i = at; i < end; i++) {
      float g = GET(gate[i]);
      y[i] = PUT(g / (1.0f + exponential(-g)) * GET(up[i]));
    }
  }
}

void NAME(swiglu_backward)(const T *dy, const T *gate, const T *up, T *dgate, T *dup, int64_t n) {
  FLAT(n) {
#pragma omp simd
    for (int64_t i = at; i < end; i++) {
      float g = GET(gate[i]), d = GET(dy[i]), open = 1.0f / (1.0f + exponential(-g));
      dup[i] = PUT(d * g * open);
      dgate[i] = PUT(d * GET(up[i]) * open * (1.0f + g * (1.0f - open)));
    }
  }
}

// Sum over a row in SPLIT strands, so that it vectorises and has one order.
#define ROW_SUM(total, width, term)                                \
  float total = 0;                                                 \
  {                                                                \
    float part[SPLIT] = {0};                                       \
    int64_t i = 0;                                                 \
    for (; i + SPLIT <= width; i += SPLIT) {                       \
      const int64_t first = i;                                     \
      _Pragma("omp simd") for (int s = 0; s < SPLIT; s++) {        \
        const int64_t c = first + s;                               \
        part[s] += (term);                                         \
      }                                                            \
    }                                                              \
    for (; i < width; i++) {                                       \
      const int64_t c = i;                                         \
      part[0] += (term);                                           \
    }                                                              \
    for (int s = 0; s < SPLIT; s++) total += part[s];              \
  }

// y = round(x inverse) weight, inverse [N] = 1/√(mean(x²) + eps)
void NAME(rms_norm)(const T *x, const T *weight, T *y, float *inverse, int64_t N, int64_t C,
                    float eps) {
#pragma omp parallel for schedule(static) if (N * C > 1 << 15)
  for (int64_t n = 0; n < N; n++) {
    const T *from = x + n * C;
    T *to = y + n * C;
    ROW_SUM(square, C, GET(from[c]) * GET(from[c]))
    const float by = inverse[n] = 1.0f / sqrtf(square / C + eps);
#pragma omp simd
    for (int64_t c = 0; c < C; c++) to[c] = PUT(GET(PUT(GET(from[c]) * by)) * GET(weight[c]));
  }
}

void NAME(rms_norm_backward)(const T *dy, const T *x, const T *weight, const float *inverse, T *dx,
                             int64_t N, int64_t C) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    const T *g = dy + n * C, *from = x + n * C;
    T *to = dx + n * C;
    const float by = inverse[n];
    ROW_SUM(along, C, GET(g[c]) * GET(weight[c]) * GET(from[c]))
    const float back = along * by * by / C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++)
      to[c] = PUT((GET(g[c]) * GET(weight[c]) - GET(from[c]) * back) * by);
  }
}

// Turn N heads of D, H to a token, by cos and sin [N / H, half]; `way` -1 turns back. Dimension i
// turns with i + half, or, if `near`, 2i with 2i + 1; those from 2 half on stay.
void NAME(rotary)(const T *x, const T *cos, const T *sin, T *y, int64_t N, int64_t H, int64_t D,
                  int64_t half, int64_t near, float way) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    const T *from = x + n * D, *c = cos + n / H * half, *s = sin + n / H * half;
    T *to = y + n * D;
    if (near) {
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        float a = GET(from[2 * i]), b = GET(from[2 * i + 1]), u = GET(c[i]), v = GET(s[i]) * way;
        to[2 * i] = PUT(a * u - b * v);
        to[2 * i + 1] = PUT(b * u + a * v);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        float a = GET(from[i]), b = GET(from[i + half]), u = GET(c[i]), v = GET(s[i]) * way;
        to[i] = PUT(a * u - b * v);
        to[i + half] = PUT(b * u + a * v);
      }
    }
    for (int64_t i = 2 * half; i < D; i++) to[i] = from[i];
  }
}

// y = x with elements dropped, the kept ones times `scale`; with `add`, y += that.
void NAME(drop)(const T *x, T *y, int64_t n, int64_t key, int64_t threshold, float scale,
                int64_t add) {
  const uint32_t key0 = (uint32_t)key, key1 = (uint32_t)(key >> 32), least = (uint32_t)threshold;
  FLAT(n) {
    uint32_t bits[256];
    for (int64_t from = at; from < end; from += 512) {
      const int64_t to = from + 512 < end ? from + 512 : end, half = (to - from + 1) / 2;
      for (int64_t i = 0; i < half; i++) bits[i] = mix((uint32_t)(from / 2 + i), key0, key1);
      const uint16_t *draw = (const uint16_t *)bits;
      if (add) {
#pragma omp simd
        for (int64_t i = from; i < to; i++)
          y[i] = PUT(GET(y[i]) + (draw[i - from] >= least ? GET(x[i]) * scale : 0.0f));
      } else {
#pragma omp simd
        for (int64_t i = from; i < to; i++)
          y[i] = draw[i - from] >= least ? PUT(GET(x[i]) * scale) : PUT(0.0f);
      }
    }
  }
}
