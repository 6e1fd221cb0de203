// bf16 products of matrices on AMX tiles, and the forms in which their operands come.
//
// A tile is 16 rows of 64 bytes. Operands of a product come as
//   rows     a matrix as it lies, 16 rows x 32 columns: the left operand
//   columns  its transpose as right operand: dword [p][i] holds row i, columns 2p and 2p+1
//   pairs    itself as right operand: dword [p][i] holds column i of rows 2p and 2p+1
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

enum { TILE = 512 /* bf16 in a tile */, STEP = 32 };

static int64_t up(int64_t n) { return (n + STEP - 1) / STEP * STEP; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static void tiles_on(void) {
  struct { uint8_t palette, start, gap[14]; uint16_t bytes[16]; uint8_t rows[16]; }
  __attribute__((packed, aligned(64))) shape = {.palette = 1};
  for (int i = 0; i < 8; i++) { shape.bytes[i] = 64; shape.rows[i] = 16; }
  _tile_loadconfig(&shape);
}

// A thread's buffers, which only grow: OWN, and one that it SHARES with the threads it starts.
enum { OWN, SHARED };
static void *scratch(int which, size_t bytes) {
  static _Thread_local void *held[2];
  static _Thread_local size_t size[2];
  if (bytes > size[which]) {
    free(held[which]);
    size[which] = (bytes + 4095) / 4096 * 4096;
    held[which] = aligned_alloc(64, size[which]);
  }
  return held[which];
}

static inline __m512 widen(const bf16 *p) {
  __m256i half = _mm256_loadu_si256((const __m256i *)p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __m512 power2(__m512 x) {
  __m512 whole = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// Lanes i of 16 with from <= i < to.
static inline __mmask16 lanes(int64_t from, int64_t to) {
  uint32_t a = (1u << larger(0, smaller(16, from))) - 1;
  uint32_t b = (1u << larger(0, smaller(16, to))) - 1;
  return (__mmask16)(b & ~a);
}

// c [16 or, if tall, 32 rows x 32] (+)= sum over steps of a (row tiles) b (two column tiles). What b
// brings streams past `a` in the first-level cache.
static inline __attribute__((always_inline)) void multiply(
    int tall, float *c, int64_t ldc, const bf16 *a0, const bf16 *a1, int64_t lda, int64_t step_a,
    const bf16 *b0, const bf16 *b1, int64_t step_b, int steps, int add) {
  float *below = c + 16 * ldc;
  if (add) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16, ldc * 4);
    if (tall) _tile_loadd(2, below, ldc * 4);
    if (tall) _tile_loadd(3, below + 16, ldc * 4);
  } else {
    _tile_zero(0); _tile_zero(1);
    if (tall) { _tile_zero(2); _tile_zero(3); }
  }
  for (int s = 0; s < steps; s++, a0 += step_a, a1 += step_a, b0 += step_b, b1 += step_b) {
    _tile_loadd(4, a0, lda * 2);
    _tile_stream_loadd(6, b0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, b1, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (!tall) continue;
    _tile_loadd(5, a1, lda * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  if (tall) _tile_stored(2, below, ldc * 4);
  if (tall) _tile_stored(3, below + 16, ldc * 4);
}

static inline void product(float *c, int64_t ldc, const bf16 *a0, const bf16 *a1, int64_t lda,
                           int64_t step_a, const bf16 *b0, const bf16 *b1, int64_t step_b,
                           int steps, int add) {
  multiply(1, c, ldc, a0, a1, lda, step_a, b0, b1, step_b, steps, add);
}

static inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int c = 0; c < 4; c++) {
    t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
  }
  for (int c = 0; c < 4; c++) {
    r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
    r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
    r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
    r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
  }
}

// Copy n rows of D and zero the rest up to a whole step.
static void pack_rows(bf16 *to, const bf16 *x, int64_t ld, int64_t n, int D) {
  for (int64_t i = 0; i < n; i++) memcpy(to + i * D, x + i * ld, 2 * D);
  memset(to + n * D, 0, 2 * (up(n) - n) * D);
}

// Tiles [n/16][D/32] of "columns".
static void pack_columns(bf16 *to, const bf16 *x, int64_t ld, int64_t n, int D) {
  for (int64_t i = 0; i < up(n); i += 16)
    for (int d = 0; d < D; d += 32, to += TILE) {
      __m512i r[16];
      for (int j = 0; j < 16; j++)
        r[j] = i + j < n ? _mm512_loadu_si512(x + (i + j) * ld + d) : _mm512_setzero_si512();
      transpose16(r);
      for (int j = 0; j < 16; j++) _mm512_store_si512(to + 32 * j, r[j]);
    }
}

// Tiles [n/32][D/16] of "pairs"; `turned`: each transposed, which makes them "rows" of xᵀ.
static void pack_pairs(bf16 *to, const bf16 *x, int64_t ld, int64_t n, int D, int turned) {
  for (int64_t i = 0; i < up(n); i += 32)
    for (int d = 0; d < D; d += 16, to += TILE) {
      __m512i r[16];
      for (int p = 0; p < 16; p++) {
        const bf16 *even = x + (i + 2 * p) * ld + d;
        __m512i a = _mm512_setzero_si512(), b = a;
        if (i + 2 * p < n) a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)even));
        if (i + 2 * p + 1 < n)
          b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(even + ld)));
        r[p] = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
      }
      if (turned) transpose16(r);
      for (int p = 0; p < 16; p++) _mm512_store_si512(to + 32 * p, r[p]);
    }
}


// One row of a running softmax in base 2: `count` scores (a whole number of 16) times `scale`, of
// which [from, to) count, become weights in p; the row's earlier sums o [D] are brought in line.
static inline void fold_row(float *s, bf16 *p, int64_t count, int64_t from, int64_t to,
                            float scale, float *top, float *total, float *o, int64_t D) {
  const __m512 by = _mm512_set1_ps(scale), none = _mm512_set1_ps(-1e30f);
  __m512 best = none;
  for (int64_t c = 0; c < count; c += 16) {
    __m512 x = _mm512_mul_ps(_mm512_load_ps(s + c), by);
    x = _mm512_mask_blend_ps(lanes(from - c, to - c), none, x);
    _mm512_store_ps(s + c, x);
    best = _mm512_max_ps(best, x);
  }
  float most = _mm512_reduce_max_ps(best), was = *top, keep = 1.0f;
  if (most < was) most = was;
  const __m512 shift = _mm512_set1_ps(most);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < count; c += 16) {
    __m512 x = power2(_mm512_sub_ps(_mm512_load_ps(s + c), shift));
    sum = _mm512_add_ps(sum, x);
    _mm256_store_si256((__m256i *)(p + c), narrow(x));
  }
  if (most != was) {
    keep = _mm512_cvtss_f32(power2(_mm512_set1_ps(was - most)));
    for (int64_t d = 0; d < D; d += 16)
      _mm512_store_ps(o + d, _mm512_mul_ps(_mm512_load_ps(o + d), _mm512_set1_ps(keep)));
  }
  *top = most;
  *total = *total * keep + _mm512_reduce_add_ps(sum);
}
