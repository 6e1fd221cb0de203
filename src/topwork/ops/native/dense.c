// y = x wᵀ + b in fp32 out of bf16 products: every number is the sum of two bf16 numbers, its
// nearest and the nearest of the rest, and of the four products the smallest is left out. Some 16
// bits of each product are right; sums are fp32.
//
// x [N, C], w [O, C], b [O] or null, y [N, O]; C and O whole numbers of 32.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "tiles.h"

#include <omp.h>

enum { CHUNK = 96 * 1024 /* numbers of x that stay in the second-level cache, split */ };

// 32 numbers as two times 32 bf16.
static inline void split(const float *x, __m512i *high, __m512i *low) {
  const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
  const __m256i ha = narrow(a), hb = narrow(b);
  const __m512 ra = _mm512_sub_ps(a, widen((const bf16 *)&ha));
  const __m512 rb = _mm512_sub_ps(b, widen((const bf16 *)&hb));
  *high = _mm512_inserti64x4(_mm512_castsi256_si512(ha), hb, 1);
  *low = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(ra)), narrow(rb), 1);
}

// 16 rows of w as tiles [C/32] of "columns", high and low.
static void split_columns(bf16 *high, bf16 *low, const float *w, int64_t C) {
  for (int64_t c = 0; c < C; c += 32, high += TILE, low += TILE) {
    __m512i h[16], l[16];
    for (int j = 0; j < 16; j++) split(w + j * C + c, h + j, l + j);
    transpose16(h);
    transpose16(l);
    for (int j = 0; j < 16; j++) {
      _mm512_store_si512(high + 32 * j, h[j]);
      _mm512_store_si512(low + 32 * j, l[j]);
    }
  }
}

static void split_rows(bf16 *high, bf16 *low, const float *x, int64_t n, int64_t C) {
  for (int64_t i = 0; i < n * C; i += 32) {
    __m512i h, l;
    split(x + i, &h, &l);
    _mm512_store_si512(high + i, h);
    _mm512_store_si512(low + i, l);
  }
  memset(high + n * C, 0, 2 * (up(n) - n) * C);
  memset(low + n * C, 0, 2 * (up(n) - n) * C);
}

// c [32 x 32] = (ah + al) (bh + bl) without al bl; rows of C, column tiles `across` apart.
static inline __attribute__((always_inline)) void product_of_sums(
    float *c, const bf16 *ah, const bf16 *al, int64_t C, const bf16 *bh, const bf16 *bl,
    int64_t across, int64_t steps) {
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int64_t s = 0; s < steps; s++, ah += 32, al += 32, bh += TILE, bl += TILE) {
    _tile_loadd(4, ah, 2 * C);
    _tile_loadd(6, bl, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, bl + across, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, ah + 16 * C, 2 * C);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, bh, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, bh + across, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, al, 2 * C);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, al + 16 * C, 2 * C);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c + 16 * 32, 128);
  _tile_stored(3, c + 16 * 32 + 16, 128);
}

// x Φ(x), with erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
static inline __m512 gelu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), half = _mm512_set1_ps(0.5f);
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 fall = power2(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-1.44269504f)));
  const __m512 rest = _mm512_mul_ps(_mm512_mul_ps(p, t), fall);  // 1 - erf(z)
  const __m512 low = _mm512_mul_ps(half, rest), high = _mm512_sub_ps(one, low);
  const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_blend_ps(below, high, low));
}

// `bent`: y is gelu of it.
void topwork_dense(const float *x, const float *w, const float *b, float *y, int64_t N, int64_t C,
                   int64_t O, int64_t biased, int64_t bent) {
  const int64_t across = C / 32 * TILE, rows = larger(STEP, CHUNK / C / STEP * STEP);
  const int64_t steps = C / 32, chunks = (N + rows - 1) / rows;
  bf16 *wh = scratch(SHARED, 4 * O * C), *wl = wh + O * C;
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t o = 0; o < O; o += 16)
      split_columns(wh + o / 16 * across, wl + o / 16 * across, w + o * C, C);
    tiles_on();
    bf16 *xh = scratch(OWN, 4 * rows * C), *xl = xh + rows * C;
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t first = chunk * rows, n = smaller(rows, N - first);
      split_rows(xh, xl, x + first * C, n, C);
      for (int64_t o = 0; o < O; o += 32) {
        const bf16 *bh = wh + o / 16 * across, *bl = wl + o / 16 * across;
        for (int64_t r = 0; r < n; r += STEP) {
          float part[STEP * 32] __attribute__((aligned(64)));
          const bf16 *ah = xh + r * C, *al = xl + r * C;
          product_of_sums(part, ah, al, C, bh, bl, across, steps);
          const __m512 b0 = biased ? _mm512_loadu_ps(b + o) : _mm512_setzero_ps();
          const __m512 b1 = biased ? _mm512_loadu_ps(b + o + 16) : _mm512_setzero_ps();
          for (int64_t i = 0; i < smaller(STEP, n - r); i++) {
            float *to = y + (first + r + i) * O + o;
            const __m512 y0 = _mm512_add_ps(_mm512_load_ps(part + 32 * i), b0);
            const __m512 y1 = _mm512_add_ps(_mm512_load_ps(part + 32 * i + 16), b1);
            _mm512_storeu_ps(to, bent ? gelu(y0) : y0);
            _mm512_storeu_ps(to + 16, bent ? gelu(y1) : y1);
          }
        }
      }
    }
    _tile_release();
  }
}
#endif
