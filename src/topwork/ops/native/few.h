// The products of few rows that few.c and crossed.c are made of; see few.c. Needs AVX-512 with bf16.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#ifdef __AMX_BF16__
#include "tiles.h"
#else
typedef uint16_t bf16;
#endif

typedef int64_t i64;

typedef struct {
  const void *weight, *bias;
  void *y;
  i64 out;
} Part;

enum { MOST = 8 /* rows of x at once */, TALL = 3 };
#define FLAT static inline __attribute__((always_inline))

static inline float get(bf16 x) { return (union { uint32_t i; float f; }){(uint32_t)x << 16}.f; }
static inline bf16 put(float x) {
  __m128bh half = _mm_cvtneps_pbh(_mm_set_ss(x));
  return (bf16)_mm_extract_epi16((__m128i)half, 0);
}

// sums [r][n] += the products of r rows of w and n rows of x in the columns under the mask.
FLAT void step(int half, __m512 sums[4][MOST], const char *w, const char *x, i64 row, int r, int n,
               uint32_t mask) {
  __m512i a[4];
#pragma GCC unroll 4
  for (int j = 0; j < r; j++)
    a[j] = half ? _mm512_maskz_loadu_epi16(mask, w + j * row)
                : _mm512_castps_si512(_mm512_maskz_loadu_ps((__mmask16)mask, w + j * row));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) {
    const __m512i b = half ? _mm512_maskz_loadu_epi16(mask, x + i * row)
                           : _mm512_castps_si512(_mm512_maskz_loadu_ps((__mmask16)mask, x + i * row));
#pragma GCC unroll 4
    for (int j = 0; j < r; j++)
      sums[j][i] = half ? _mm512_dpbf16_ps(sums[j][i], (__m512bh)a[j], (__m512bh)b)
                        : _mm512_fmadd_ps(_mm512_castsi512_ps(a[j]), _mm512_castsi512_ps(b), sums[j][i]);
  }
}

// r rows of w from `o` on with n rows of x; `ahead` bytes further lies what comes next.
FLAT void block(int half, const Part *p, const char *x, i64 C, i64 o, i64 first, int r, int n) {
  const i64 size = half ? 2 : 4, row = C * size, whole = row & ~(i64)63;
  const char *w = (const char *)p->weight + o * row;
  __m512 sums[4][MOST];
#pragma GCC unroll 4
  for (int j = 0; j < r; j++)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) sums[j][i] = _mm512_setzero_ps();
  x += first * row;
  for (i64 c = 0; c < whole; c += 64) {
    if (first == 0)
#pragma GCC unroll 4
      for (int j = 0; j < r; j++) _mm_prefetch(w + (r + j) * row + c, _MM_HINT_T0);
    step(half, sums, w + c, x + c, row, r, n, half ? ~0u : 0xffffu);
  }
  if (whole < row)
    step(half, sums, w + whole, x + whole, row, r, n, (1u << (row - whole) / size) - 1);
#pragma GCC unroll 4
  for (int j = 0; j < r; j++)
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
      const float sum = _mm512_reduce_add_ps(sums[j][i]);
      const i64 at = (first + i) * p->out + o + j;
      if (half)
        ((bf16 *)p->y)[at] = put(sum + (p->bias ? get(((const bf16 *)p->bias)[o + j]) : 0.0f));
      else
        ((float *)p->y)[at] = sum + (p->bias ? ((const float *)p->bias)[o + j] : 0.0f);
    }
}

FLAT void rows(int half, const Part *p, const char *x, i64 N, i64 C, i64 o, int r) {
  i64 i = 0;
  for (; i + MOST <= N; i += MOST) block(half, p, x, C, o, i, r, MOST);
  switch (N - i) {
    case 1: block(half, p, x, C, o, i, r, 1); break;
    case 2: block(half, p, x, C, o, i, r, 2); break;
    case 3: block(half, p, x, C, o, i, r, 3); break;
    case 4: block(half, p, x, C, o, i, r, 4); break;
    case 5: block(half, p, x, C, o, i, r, 5); break;
    case 6: block(half, p, x, C, o, i, r, 6); break;
    case 7: block(half, p, x, C, o, i, r, 7); break;
  }
}

FLAT void share(int half, const Part *p, const char *x, i64 N, i64 C, i64 o, i64 stop) {
  if (N < 7)
    for (; o + 4 <= stop; o += 4) rows(half, p, x, N, C, o, 4);
  for (; o + 3 <= stop; o += 3) rows(half, p, x, N, C, o, 3);
  for (; o < stop; o++) rows(half, p, x, N, C, o, 1);
}

static void wide_share(const Part *p, const char *x, i64 N, i64 C, i64 o, i64 stop) {
  share(0, p, x, N, C, o, stop);
}
static void half_share(const Part *p, const char *x, i64 N, i64 C, i64 o, i64 stop) {
  share(1, p, x, N, C, o, stop);
}

#ifdef __AMX_BF16__
// Up to 32 rows of x as right operands [C/32][2]: dword [p][i] holds columns 2p and 2p+1 of row i.
// The second is left out where there are no more than 16 rows.
static void pack(bf16 *packed, const bf16 *x, i64 N, i64 C) {
  for (i64 c = 0; c < C; c += 32, packed += 2 * TILE)
    for (i64 first = 0; first < N; first += 16) {
      bf16 *to = packed + first / 16 * TILE;
      __m512i r[16];
      for (i64 i = 0; i < 16; i++)
        r[i] = first + i < N ? _mm512_loadu_si512(x + (first + i) * C + c) : _mm512_setzero_si512();
      transpose16(r);
      for (int i = 0; i < 16; i++) _mm512_store_si512(to + 32 * i, r[i]);
    }
}

// 16 rows of w from `o` on with all rows of x.
static void tile_block(const Part *p, const bf16 *packed, i64 N, i64 C, i64 o) {
  const bf16 *w = (const bf16 *)p->weight + o * C;
  float sums[2][16][16] __attribute__((aligned(64)));
  _tile_zero(0); _tile_zero(1);
  for (i64 c = 0; c < C; c += 32, packed += 2 * TILE) {
    for (int i = 0; i < 16; i++) _mm_prefetch((const char *)(w + (16 + i) * C + c), _MM_HINT_T0);
    _tile_loadd(4, w + c, 2 * C);
    _tile_loadd(5, packed, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (N <= 16) continue;
    _tile_loadd(6, packed + TILE, 64);
    _tile_dpbf16ps(1, 4, 6);
  }
  _tile_stored(0, sums[0], 64);
  if (N > 16) _tile_stored(1, sums[1], 64);
  const __m512 bias = p->bias ? widen((const bf16 *)p->bias + o) : _mm512_setzero_ps();
  for (i64 first = 0; first < N; first += 16) {
    __m512i r[16];
    for (int j = 0; j < 16; j++) r[j] = _mm512_load_si512(sums[first / 16][j]);
    transpose16(r);
    for (i64 i = 0; i < smaller(16, N - first); i++) {
      __m256i half = narrow(_mm512_add_ps(_mm512_castsi512_ps(r[i]), bias));
      _mm256_storeu_si256((__m256i *)((bf16 *)p->y + (first + i) * p->out + o), half);
    }
  }
}

static void tile_share(const Part *p, const bf16 *packed, i64 N, i64 C, i64 o, i64 stop) {
  tiles_on();
  for (; o < stop; o += 16) tile_block(p, packed, N, C, o);
  _tile_release();
}
#else
static void *scratch(int which, size_t bytes) { return 0; }
enum { OWN, SHARED };
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static void pack(bf16 *to, const bf16 *x, i64 N, i64 C) {}
static void tile_share(const Part *p, const bf16 *packed, i64 N, i64 C, i64 o, i64 stop) {}
#endif

// The outputs from `o` to `stop` of one weight. `packed`: x for tiles, which take C in whole numbers
// of 32 and `o` and O of 16, up to 32 rows; or null.
FLAT void few(int half, const Part *p, const void *x, const bf16 *packed, i64 N, i64 C, i64 o,
              i64 stop) {
  if (packed && p->out % 16 == 0) tile_share(p, packed, N, C, o, stop);
  else (half ? half_share : wide_share)(p, (const char *)x, N, C, o, stop);
}
