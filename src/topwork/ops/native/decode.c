// A decoder's step for a few rows in bf16, as a program of the instructions below.
//
// Each row is the next token of some text; its keys and values lie in pages. All rows go through
// the weights together, each weight is read once, and what is computed for a row does not depend
// on the other rows: every row's sums are formed in the same order whoever is beside it.
//
// Letters: R rows, C width, H heads, K key/value heads, D head size, G = H / K. Weights are
// [out, in] with `in` a multiple of 32 and `out` of 16; in memory as
//   BF16    as they are
//   INT8    [out/16][in/32][16 rows][32 columns] int8, and one float scale per row
//   CODE4   4-bit codes [out/16][in/32][4][32 columns] of 16 bits, whose digits are 4 rows; a bf16
//           scale per `group` columns, [out/16][in/group][16 rows], and perhaps a bf16 base of that
//           shape; a table of 16 floats: weight = scale table[code] + base
//
// Keys and values lie in pages [pages, size, K, D], of any strides but the last. Low-rank terms are
// A [16 ⌈r/16⌉, in] and B [out, 32 ⌈r/32⌉], zero behind r.
//
// With AMX, 16 weight rows are the left operand and the rows of x, packed by pairs of columns, the
// right one. One or two rows meet quantised weights in vector registers instead, unless the step
// is `steady`: then every row is computed in the one way. Without AMX plain loops say the same.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t i64;

enum { EMBED, NORM, LINEARS, ROTARY, APPEND, ATTEND, GATE, LOW_RANK, SELECT, ADD, BEST };
enum { BF16, INT8, CODE4 };
enum { SILU, GELU_TANH, GELU, RELU };
enum { TILE = 512, MAX_GROUPS = 16, MAX_HEADS = 16 };
enum { AHEAD = 2048 };  // bytes of weights of few bits that are on their way

typedef struct { i64 op, a[15]; } Instruction;
typedef struct { i64 page, token, head; } Strides;

typedef struct {
  const void *weight;
  const void *scale;
  const bf16 *base;
  const float *table;
  const bf16 *bias;
  bf16 *y;
  i64 out, format, group, stride, add;  // `add`: y += instead of y =
} Part;

typedef struct {
  const bf16 *a, *b;
  i64 rank;
  float scale;
  int32_t pad;
} LowRank;

typedef struct {
  bf16 *y;
  const LowRank *terms;  // by adapter
  i64 out, stride;
} LowPart;

typedef struct {
  i64 rows, wanted, table_stride, threads, portable, steady, adapters;
  const i64 *ids, *positions;   // [R]
  const int32_t *pages;         // [R, table_stride]
  const int32_t *first;         // [R]: keys before it are padding
  const int32_t *adapter;       // [R]: which low-rank terms, -1 for none
  const int32_t *choice;        // [wanted]: the rows that go to the head
  bf16 *pack;                   // the right operand of the linears
} Step;

static inline float get(bf16 x) {
  union { uint32_t i; float f; } u = {.i = (uint32_t)x << 16};
  return u.f;
}

static inline bf16 put(float x) {  // round to nearest, ties to even
  union { float f; uint32_t i; } u = {.f = x};
  const uint32_t rounded = (u.i + 0x7fff + (u.i >> 16 & 1)) >> 16, nan = u.i >> 16 | 64;
  return (bf16)((u.i & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

static inline i64 low(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 high(i64 a, i64 b) { return a > b ? a : b; }

static void *scratch(size_t bytes) {  // one buffer per thread that only grows
  static _Thread_local void *held;
  static _Thread_local size_t size;
  if (bytes > size) {
    free(held);
    size = (bytes + 4095) / 4096 * 4096;
    held = aligned_alloc(64, size);
  }
  return held;
}

// -- weights -------------------------------------------------------------------------------------

static inline float weight_at(const Part *p, i64 in, i64 row, i64 column) {
  if (p->format == BF16) return get(((const bf16 *)p->weight)[row * in + column]);
  const i64 block = row / 16 * (in / 32) + column / 32, i = row % 16, j = column % 32;
  if (p->format == INT8) return ((const int8_t *)p->weight)[block * 512 + 32 * i + j];
  const int code = ((const uint16_t *)p->weight)[block * 128 + i / 4 * 32 + j] >> i % 4 * 4 & 15;
  const i64 at = (row / 16 * (in / p->group) + column / p->group) * 16 + i;
  const float base = p->base ? get(p->base[at]) : 0.0f;
  return get(put(p->table[code] * get(((const bf16 *)p->scale)[at]) + base));
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>

static void tiles_on(void) {
  struct { uint8_t palette, start, gap[14]; uint16_t bytes[16]; uint8_t rows[16]; }
  __attribute__((packed, aligned(64))) shape = {.palette = 1};
  for (int i = 0; i < 8; i++) { shape.bytes[i] = 64; shape.rows[i] = 16; }
  _tile_loadconfig(&shape);
}
static void tiles_off(void) { _tile_release(); }

static inline __m512 widen(const bf16 *p) {
  __m512i half = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
}
static inline void narrow(__m512 x, bf16 *to) {
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x));
}
static inline __m512 widen8(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

// 16 rows and 32 columns of a quantised weight as bf16.
static inline void expand(const Part *p, i64 in, i64 row, i64 step, bf16 *tile) {
  const i64 block = row / 16 * (in / 32) + step;
  if (p->format == INT8) {
    const int8_t *w = (const int8_t *)p->weight + block * 512;
    for (int i = 0; i < 8; i++) _mm_prefetch((const char *)w + AHEAD + 64 * i, _MM_HINT_T0);
    for (int i = 0; i < 16; i++, w += 32)
      _mm512_store_si512(tile + 32 * i, (__m512i)_mm512_cvtne2ps_pbh(widen8(w + 16), widen8(w)));
    return;
  }
  const __m512i *codes = (const __m512i *)p->weight + block * 4;
  const i64 at = (row / 16 * (in / p->group) + 32 * step / p->group) * 16;
  const bf16 *scales = (const bf16 *)p->scale + at, *bases = p->base ? p->base + at : NULL;
  const __m512 table = _mm512_loadu_ps(p->table);
  for (int q = 0; q < 4; q++) {
    __m512i digits = _mm512_loadu_si512(codes + q);
    _mm_prefetch((const char *)codes + AHEAD + 64 * q, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int i = 4 * q; i < 4 * q + 4; i++) {
      const __m512 base = _mm512_set1_ps(bases ? get(bases[i]) : 0.0f);
      __m256i half =
          (__m256i)_mm512_cvtneps_pbh(_mm512_fmadd_ps(table, _mm512_set1_ps(get(scales[i])), base));
      __m512i values = _mm512_broadcast_i64x4(half);  // twice: the lookup takes five bits
      _mm512_store_si512(tile + 32 * i, _mm512_permutexvar_epi16(digits, values));
      digits = _mm512_srli_epi16(digits, 4);
    }
  }
}

// sums[16 i] of 16 quantised weight rows i with one row x, of which `whole` are the sums by 32.
static void row_products(const Part *p, i64 in, i64 row, const bf16 *x, const float *whole,
                         float *sums) {
  __m512 total[16], shift = _mm512_setzero_ps();  // of the bases, a lane for each row
  for (int i = 0; i < 16; i++) total[i] = _mm512_setzero_ps();
  if (p->format == INT8) {
    const int8_t *w = (const int8_t *)p->weight + row * in;
    for (i64 c = 0; c < in; c += 32, w += 512) {
      const __m512 a = widen(x + c), b = widen(x + c + 16);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        if (i % 2 == 0) _mm_prefetch((const char *)w + AHEAD + 32 * i, _MM_HINT_T0);
        total[i] = _mm512_fmadd_ps(widen8(w + 32 * i), a, total[i]);
        total[i] = _mm512_fmadd_ps(widen8(w + 32 * i + 16), b, total[i]);
      }
    }
  } else {
    const __m512i *codes = (const __m512i *)p->weight + row / 16 * (in / 32) * 4;
    const bf16 *scales = (const bf16 *)p->scale + row / 16 * (in / p->group) * 16;
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p->table));
    const __m512i values = _mm512_broadcast_i64x4(half);
    const bf16 *bases = p->base ? p->base + row / 16 * (in / p->group) * 16 : NULL;
    float scale[16] __attribute__((aligned(64)));
    for (i64 c = 0; c < in; c += 32, codes += 4) {
      if (c % p->group == 0) {
        _mm512_store_ps(scale, widen(scales));
        scales += 16;
      }
      const __m512bh one = (__m512bh)_mm512_loadu_si512(x + c);
      if (bases)
        shift = _mm512_fmadd_ps(widen(bases + c / p->group * 16), _mm512_set1_ps(whole[c / 32]), shift);
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) {
        const __m512i digits = _mm512_loadu_si512(codes + q);
        _mm_prefetch((const char *)codes + AHEAD + 64 * q, _MM_HINT_T0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const __m512i w = _mm512_permutexvar_epi16(_mm512_srli_epi16(digits, 4 * i), values);
          const __m512 part = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)w, one);
          total[4 * q + i] = _mm512_fmadd_ps(_mm512_set1_ps(scale[4 * q + i]), part, total[4 * q + i]);
        }
      }
    }
  }
  float shifts[16];
  _mm512_storeu_ps(shifts, shift);
  for (int i = 0; i < 16; i++) sums[16 * i] = _mm512_reduce_add_ps(total[i]) + shifts[i];
}

// sums [groups][16 weight rows][16 rows of x] of 16 weight rows; at most 4 groups at once, which lie
// `far` apart.
static void products(const Part *p, i64 in, i64 row, const bf16 *pack, i64 steps, i64 groups,
                     i64 far, float *sums) {
  bf16 tiles[4][TILE] __attribute__((aligned(64)));  // expanded two steps ahead of their use
  const int coded = p->format != BF16;
  const bf16 *w = (const bf16 *)p->weight + row * in;
  for (i64 g = 0; g < groups; g += 4) {
    const bf16 *x = pack + g * far;
    const i64 n = groups - g;
    _tile_zero(0);
    if (n > 1) _tile_zero(1);
    if (n > 2) _tile_zero(2);
    if (n > 3) _tile_zero(3);
    if (coded) expand(p, in, row, 0, tiles[0]);
    if (coded && steps > 1) expand(p, in, row, 1, tiles[1]);
    for (i64 s = 0; s < steps; s++, x += TILE) {
      if (!coded) {
        _tile_loadd(4, w + 32 * s, 2 * in);
        if (g == 0)
          for (int i = 0; i < 16; i++)
            _mm_prefetch((const char *)(w + (16 + i) * in + 32 * s), _MM_HINT_T1);
      } else {
        if (s + 2 < steps) expand(p, in, row, s + 2, tiles[(s + 2) % 4]);
        _tile_loadd(4, tiles[s % 4], 64);
      }
      _tile_loadd(5, x, 64);
      _tile_dpbf16ps(0, 4, 5);
      if (n > 1) { _tile_loadd(6, x + far, 64); _tile_dpbf16ps(1, 4, 6); }
      if (n > 2) { _tile_loadd(7, x + 2 * far, 64); _tile_dpbf16ps(2, 4, 7); }
      if (n > 3) { _tile_loadd(6, x + 3 * far, 64); _tile_dpbf16ps(3, 4, 6); }
    }
    _tile_stored(0, sums + g * 256, 64);
    if (n > 1) _tile_stored(1, sums + (g + 1) * 256, 64);
    if (n > 2) _tile_stored(2, sums + (g + 2) * 256, 64);
    if (n > 3) _tile_stored(3, sums + (g + 3) * 256, 64);
  }
}

// scores [16 keys][16 heads] of keys that lie `stride` apart against packed queries.
static void key_products(const bf16 *k, i64 stride, const bf16 *pack, i64 steps, float *scores) {
  _tile_zero(0);
  for (i64 s = 0; s < steps; s++) {
    _tile_loadd(4, k + 32 * s, 2 * stride);
    _tile_loadd(5, pack + s * TILE, 64);
    _tile_dpbf16ps(0, 4, 5);
  }
  _tile_stored(0, scores, 64);
}
// Row i, column j of the 16 registers becomes row j, column i.
static inline void transpose(__m512 x[16]) {
  __m512 y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      __m512d a = _mm512_castps_pd(y[i + j]), b = _mm512_castps_pd(y[i + j + 2]);
      x[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      x[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  for (int i = 0; i < 4; i++) {
    __m512 a = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88), b = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
    __m512 c = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
    __m512 d = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    y[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    y[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    y[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; i++) x[i] = y[i];
}

// The sums [16 weight rows][16 rows of x] of one group into y [count][16]: scaled, with the bias.
static void deliver(const float *sums, const float *scales, const float *biases, bf16 *y,
                    i64 stride, i64 count, i64 add) {
  const __m512 scale = _mm512_loadu_ps(scales), bias = _mm512_loadu_ps(biases);
  __m512 x[16];
  for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_ps(sums + 16 * i);
  transpose(x);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) {
    if (r >= count) break;
    __m512 found = _mm512_fmadd_ps(x[r], scale, bias);
    if (add) {
      __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(found));
      found = _mm512_add_ps(widen(y), _mm512_castsi512_ps(_mm512_slli_epi32(half, 16)));
    }
    narrow(found, y);
    y += stride;
  }
}

// out [heads <= 4][64] += weights [heads][16 tokens] v [16 tokens][64]
static inline void mix(const float *const *weights, const bf16 *v, i64 stride, i64 tokens,
                       float *out) {
  __m512 sum[4][4];
  for (int g = 0; g < 4; g++)
    for (int c = 0; c < 4; c++) sum[g][c] = _mm512_loadu_ps(out + 64 * g + 16 * c);
  for (i64 t = 0; t < tokens; t++, v += stride) {
    const __m512 a = widen(v), b = widen(v + 16), c = widen(v + 32), d = widen(v + 48);
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
      const __m512 w = _mm512_set1_ps(weights[g][t]);
      sum[g][0] = _mm512_fmadd_ps(w, a, sum[g][0]);
      sum[g][1] = _mm512_fmadd_ps(w, b, sum[g][1]);
      sum[g][2] = _mm512_fmadd_ps(w, c, sum[g][2]);
      sum[g][3] = _mm512_fmadd_ps(w, d, sum[g][3]);
    }
  }
  for (int g = 0; g < 4; g++)
    for (int c = 0; c < 4; c++) _mm512_storeu_ps(out + 64 * g + 16 * c, sum[g][c]);
}
#else
static void tiles_on(void) {}
static void tiles_off(void) {}
#define ONLY_PORTABLE
#endif

// Row b of group g in the packed operand: column c is at [step][pair][b][c % 2].
static inline float packed_at(const bf16 *pack, i64 steps, i64 g, i64 b, i64 c) {
  return get(pack[(g * steps + c / 32) * TILE + (c % 32 / 2) * 32 + 2 * b + c % 2]);
}

static void portable_products(const Part *p, i64 in, i64 row, const bf16 *pack, i64 steps,
                              i64 groups, float *sums) {
  float *w = scratch(sizeof(float) * in);
  for (int i = 0; i < 16; i++) {
    for (i64 c = 0; c < in; c++) w[c] = weight_at(p, in, row + i, c);
    for (i64 g = 0; g < groups; g++) {
      float total[32] = {0};  // even and odd columns of 16 rows
      for (i64 s = 0; s < steps; s++)
        for (i64 pair = 0; pair < 16; pair++) {
          const bf16 *x = pack + (g * steps + s) * TILE + 32 * pair;
          const float one = w[32 * s + 2 * pair], two = w[32 * s + 2 * pair + 1];
#pragma omp simd
          for (int j = 0; j < 32; j++) total[j] += get(x[j]) * (j % 2 ? two : one);
        }
      for (int b = 0; b < 16; b++) sums[g * 256 + 16 * i + b] = total[2 * b] + total[2 * b + 1];
    }
  }
}

static void portable_key_products(const bf16 *k, i64 stride, const bf16 *pack, i64 steps,
                                  float *scores) {
  for (int t = 0; t < 16; t++)
    for (int h = 0; h < 16; h++) {
      float total = 0;
      for (i64 c = 0; c < 32 * steps; c++)
        total += get(k[t * stride + c]) * packed_at(pack, steps, 0, h, c);
      scores[16 * t + h] = total;
    }
}

// 32 columns of `count` rows that lie `stride` apart, as one tile of the right operand.
static void pack_tile(const bf16 *x, i64 stride, i64 count, bf16 *tile, i64 portable) {
#ifndef ONLY_PORTABLE
  if (!portable) {
    __m512 rows[16];
    for (int b = 0; b < 16; b++)
      rows[b] = b < count ? _mm512_loadu_ps((const float *)(x + b * stride)) : _mm512_setzero_ps();
    if (count > 1) transpose(rows);
    if (count == 1) {  // one row: its pairs go to the first column
      float *to = (float *)tile, one[16];
      _mm512_storeu_ps(one, rows[0]);
      for (int p = 0; p < 16; p++) to[16 * p] = one[p];
      return;
    }
    for (int p = 0; p < 16; p++) _mm512_storeu_ps((float *)tile + 16 * p, rows[p]);
    return;
  }
#endif
  for (i64 b = 0; b < count; b++)
    for (i64 c = 0; c < 32; c++) tile[c / 2 * 32 + 2 * b + c % 2] = x[b * stride + c];
}

// y = W x for all rows: (x, in, parts, count). Each thread takes a stretch of 16-row blocks.
static void linears(const Instruction *at, const Step *step, i64 rows, int me, int threads) {
  const bf16 *x = (const bf16 *)at->a[0];
  const i64 in = at->a[1], count = at->a[3], steps = in / 32, groups = (rows + 15) / 16;
  const Part *parts = (const Part *)at->a[2];
  for (i64 i = me; i < groups * steps; i += threads)
    pack_tile(x + i / steps * 16 * in + i % steps * 32, in, low(16, rows - i / steps * 16),
              step->pack + i * TILE, step->portable);
#pragma omp barrier
  i64 blocks = 0;
  for (i64 i = 0; i < count; i++) blocks += parts[i].out / 16;
  float sums[MAX_GROUPS * 256] __attribute__((aligned(64)));
  const i64 by_rows = !step->portable && rows <= 2 && !step->steady;
  float *whole = by_rows ? scratch(sizeof(float) * rows * steps) : NULL;
  for (i64 i = 0; by_rows && i < rows * steps; i++) {
    whole[i] = 0;
    for (i64 c = 0; c < 32; c++) whole[i] += get(x[32 * i + c]);
  }
  for (i64 block = blocks * me / threads; block < blocks * (me + 1) / threads; block++) {
    const Part *p = parts;
    i64 row = block;
    while (row >= p->out / 16) row -= p++->out / 16;
    row *= 16;
#ifndef ONLY_PORTABLE
    if (by_rows && p->format != BF16)
      for (i64 r = 0; r < rows; r++)
        row_products(p, in, row, x + r * in, whole + r * steps, sums + r);
    else if (!step->portable) products(p, in, row, step->pack, steps, groups, steps * TILE, sums);
    else
#endif
      portable_products(p, in, row, step->pack, steps, groups, sums);
    float scale[16], bias[16];
    for (int i = 0; i < 16; i++) {
      scale[i] = p->format == INT8 ? ((const float *)p->scale)[row + i] : 1.0f;
      bias[i] = p->bias ? get(p->bias[row + i]) : 0.0f;
    }
#ifndef ONLY_PORTABLE
    if (!step->portable) {
      for (i64 g = 0; g < groups; g++)
        deliver(sums + 256 * g, scale, bias, p->y + 16 * g * p->stride + row, p->stride,
                low(16, rows - 16 * g), p->add);
      continue;
    }
#endif
    for (i64 r = 0; r < rows; r++) {
      const float *from = sums + r / 16 * 256 + r % 16;
      bf16 *y = p->y + r * p->stride + row;
      for (int i = 0; i < 16; i++) {
        bf16 value = put(from[16 * i] * scale[i] + bias[i]);
        y[i] = p->add ? put(get(y[i]) + get(value)) : value;
      }
    }
  }
}

// -- the rest ------------------------------------------------------------------------------------

static float dot(const bf16 *a, const bf16 *b, i64 n) {
  float part[16] = {0}, total = 0;
  i64 i = 0;
  for (; i + 16 <= n; i += 16) {
#pragma omp simd
    for (int s = 0; s < 16; s++) part[s] += get(a[i + s]) * get(b[i + s]);
  }
  for (; i < n; i++) total += get(a[i]) * get(b[i]);
  for (int s = 0; s < 16; s++) total += part[s];
  return total;
}

// (x, weight, y, C, eps, vectors per row, offset, wide, bias, centred, weights): the norm of vectors
// of C, y = (offset + weight) x / rms(x) + bias, of x less its mean if `centred`, rounded before the
// weight unless `wide`. weight and bias may be missing; `weights`: so many take turns.
static void norm(const Instruction *at, i64 rows, int me, int threads) {
  const i64 width = at->a[3], vectors = rows * at->a[5], weights = at->a[10];
  float eps, offset;
  memcpy(&eps, &at->a[4], 4);
  memcpy(&offset, &at->a[6], 4);
  for (i64 r = me; r < vectors; r += threads) {
    const bf16 *x = (const bf16 *)at->a[0] + r * width;
    const bf16 *weight = at->a[1] ? (const bf16 *)at->a[1] + r % weights * width : NULL;
    const bf16 *bias = (const bf16 *)at->a[8];
    bf16 *y = (bf16 *)at->a[2] + r * width;
    if (at->a[9]) {
      float mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
      for (i64 i = 0; i < width; i++) mean += get(x[i]);
      mean /= width;
#pragma omp simd reduction(+ : square)
      for (i64 i = 0; i < width; i++) square += (get(x[i]) - mean) * (get(x[i]) - mean);
      const float inverse = 1.0f / sqrtf(square / width + eps);
      for (i64 i = 0; i < width; i++) {
        const float unit = (get(x[i]) - mean) * inverse;
        y[i] = put((weight ? unit * get(weight[i]) : unit) + (bias ? get(bias[i]) : 0.0f));
      }
      continue;
    }
    const float inverse = 1.0f / sqrtf(dot(x, x, width) / width + eps);
    if (!weight) {
#pragma omp simd
      for (i64 i = 0; i < width; i++) y[i] = put(get(x[i]) * inverse);
    } else if (at->a[7]) {
#pragma omp simd
      for (i64 i = 0; i < width; i++) y[i] = put(get(x[i]) * inverse * (offset + get(weight[i])));
    } else {
#pragma omp simd
      for (i64 i = 0; i < width; i++) y[i] = put(get(put(get(x[i]) * inverse)) * get(weight[i]));
    }
  }
}

static inline float step_of(float x, i64 wide) { return wide ? x : get(put(x)); }

// (x, heads, D, cos, sin, dim, interleaved, wide): turns the first `dim` of x [R, heads, D] by tables
// [positions, dim / 2] fp32, dimension d with d + dim / 2, or 2 d with 2 d + 1; each product is
// rounded unless `wide`
static void rotary(const Instruction *at, const Step *step, i64 rows, int me, int threads) {
  const i64 heads = at->a[1], size = at->a[2], half = at->a[5] / 2, wide = at->a[7];
  for (i64 i = me; i < rows * heads; i += threads) {
    const i64 place = step->positions[i / heads] * half;
    const float *cosine = (const float *)at->a[3] + place, *sine = (const float *)at->a[4] + place;
    bf16 *x = (bf16 *)at->a[0] + i * size;
    if (at->a[6]) {
      for (i64 d = 0; d < half; d++) {
        const float a = get(x[2 * d]), b = get(x[2 * d + 1]), c = cosine[d], s = sine[d];
        x[2 * d] = put(step_of(a * c, wide) - step_of(b * s, wide));
        x[2 * d + 1] = put(step_of(b * c, wide) + step_of(a * s, wide));
      }
      continue;
    }
#pragma omp simd
    for (i64 d = 0; d < half; d++) {
      const float a = get(x[d]), b = get(x[d + half]), c = cosine[d], s = sine[d];
      x[d] = put(step_of(a * c, wide) - step_of(b * s, wide));
      x[d + half] = put(step_of(b * c, wide) + step_of(a * s, wide));
    }
  }
}

static inline i64 slot(const Step *step, i64 row, i64 token, i64 size, const Strides *by) {
  const i64 page = step->pages[row * step->table_stride + token / size];
  return page * by->page + token % size * by->token;
}

// (k, v, keys, values, K, D, page size, strides)
static void append(const Instruction *at, const Step *step, i64 rows, int me, int threads) {
  const i64 heads = at->a[4], size = at->a[5];
  const Strides *by = (const Strides *)&at->a[7];
  for (i64 r = me; r < rows; r += threads) {
    const i64 to = slot(step, r, step->positions[r] + step->first[r], at->a[6], by);
    for (i64 h = 0; h < heads; h++) {
      const i64 from = (r * heads + h) * size, place = to + h * by->head;
      memcpy((bf16 *)at->a[2] + place, (const bf16 *)at->a[0] + from, 2 * size);
      memcpy((bf16 *)at->a[3] + place, (const bf16 *)at->a[1] + from, 2 * size);
    }
  }
}

static inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float whole = rintf(x * 1.44269504f), f = x * 1.44269504f - whole;
  float p = 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  union { int32_t i; float f; } scale = {.i = ((int32_t)whole + 127) << 23};
  return p * scale.f;
}

// One key/value head of one row; `scores` [G, up to 16 S].
static void attend_one(const Instruction *at, const Step *step, i64 row, i64 head, bf16 *pack,
                       float *scores) {
  const i64 heads = at->a[2], kv = at->a[3], size = at->a[4], page = at->a[7], group = heads / kv;
  const Strides *by = (const Strides *)&at->a[11];
  const i64 stop = step->positions[row] + step->first[row] + 1, stride = by->token;
  const i64 place = head * by->head;
  const i64 window = at->a[8], span = (stop + 15) / 16 * 16;
  const i64 first = high(step->first[row], window ? stop - window : 0), from = first / 16 * 16;
  float scale, softcap;
  memcpy(&scale, &at->a[9], 4);
  memcpy(&softcap, &at->a[10], 4);
  const bf16 *q = (const bf16 *)at->a[0] + row * heads * size + head * group * size;
  for (i64 s = 0; s < size / 32; s++)
    pack_tile(q + 32 * s, size, group, pack + s * TILE, step->portable);
  float found[256] __attribute__((aligned(64))), best[MAX_HEADS], total[MAX_HEADS];
  const bf16 *sinks = at->a[14] ? (const bf16 *)at->a[14] + head * group : NULL;
  for (i64 g = 0; g < group; g++) best[g] = sinks ? get(sinks[g]) : -INFINITY;
  for (i64 t = from; t < stop; t += 16) {
    const bf16 *k = (const bf16 *)at->a[5] + slot(step, row, t, page, by) + place;
    const i64 next = low(t + 32, stop - 1) / 16 * 16;  // on its way while this block is computed
    const bf16 *ahead = (const bf16 *)at->a[5] + slot(step, row, next, page, by) + place;
    for (i64 i = 0; i < 16; i++)
      for (i64 c = 0; c < size; c += 32) __builtin_prefetch(ahead + i * stride + c);
#ifndef ONLY_PORTABLE
    if (!step->portable) key_products(k, stride, pack, size / 32, found);
    else
#endif
      portable_key_products(k, stride, pack, size / 32, found);
    for (i64 g = 0; g < group; g++) {
      float *s = scores + g * span + t, top = best[g];
#pragma omp simd reduction(max : top)
      for (int i = 0; i < 16; i++) {
        float one = found[16 * i + g] * scale;
        if (softcap > 0) one = softcap * tanhf(one / softcap);
        one = t + i >= first && t + i < stop ? one : -INFINITY;
        s[i] = one;
        top = one > top ? one : top;
      }
      best[g] = top;
    }
  }
  for (i64 g = 0; g < group; g++) {
    float *s = scores + g * span;
    float part[16] = {0};
    for (i64 t = from; t < stop; t += 16) {
#pragma omp simd
      for (int i = 0; i < 16; i++) {
        const i64 token = t + i;
        const float e = token >= first && token < stop ? exponential(s[token] - best[g]) : 0.0f;
        s[token] = e;
        part[i] += e;
      }
    }
    total[g] = sinks ? exponential(get(sinks[g]) - best[g]) : 0.0f;
    for (int i = 0; i < 16; i++) total[g] += part[i];
  }
  bf16 *out = (bf16 *)at->a[1] + row * heads * size + head * group * size;
  const float nothing[16] = {0};
  for (i64 c = 0; c < size; c += 64)
    for (i64 h = 0; h < group; h += 4) {
      const i64 width = low(64, size - c);
      float sum[4 * 64] = {0};
      for (i64 t = from; t < stop; t += 16) {  // 16 tokens lie in one page
        const i64 skip = high(0, first - t);  // what is out of sight may not be a number
        const bf16 *v =
            (const bf16 *)at->a[6] + slot(step, row, t, page, by) + skip * stride + place + c;
        const i64 tokens = low(16, stop - t) - skip, next = low(t + 32, stop - 1) / 16 * 16;
        const bf16 *ahead =
            (const bf16 *)at->a[6] + slot(step, row, next, page, by) + place + c;
        for (i64 i = 0; i < 16; i++) {
          __builtin_prefetch(ahead + i * stride);
          __builtin_prefetch(ahead + i * stride + 32);
        }
        const float *weights[4];
        for (i64 g = 0; g < 4; g++) weights[g] = h + g < group ? scores + (h + g) * span + t + skip : nothing;
#ifndef ONLY_PORTABLE
        if (!step->portable && width == 64) {
          mix(weights, v, stride, tokens, sum);
          continue;
        }
#endif
        for (i64 i = 0; i < tokens; i++)
          for (i64 g = 0; g < 4; g++) {
#pragma omp simd
            for (i64 d = 0; d < width; d++) sum[64 * g + d] += weights[g][i] * get(v[i * stride + d]);
          }
      }
      for (i64 g = 0; g < low(4, group - h); g++)
        for (i64 d = 0; d < width; d++)
          out[(h + g) * size + c + d] = put(sum[64 * g + d] / total[h + g]);
    }
}

// (q, out, H, K, D, keys, values, page size, window, scale, softcap, strides, sinks)
static void attend(const Instruction *at, const Step *step, i64 rows, int me, int threads) {
  const i64 kv = at->a[3], group = at->a[2] / kv, steps = at->a[4] / 32;
  for (i64 i = rows * kv * me / threads; i < rows * kv * (me + 1) / threads; i++) {
    const i64 row = i / kv, span = (step->positions[row] + step->first[row] + 16) / 16 * 16;
    char *room = scratch(2 * TILE * steps + sizeof(float) * group * span);
    attend_one(at, step, row, i % kv, (bf16 *)room, (float *)(room + 2 * TILE * steps));
  }
}

static inline float activated(float x, i64 kind) {
  if (kind == SILU) return x / (1.0f + exponential(-x));
  if (kind == RELU) return x > 0 ? x : 0.0f;
  if (kind == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
}

// (gate, up, y, width, kind, stride): y = act(gate) up, or act(gate) without `up`
static void gate(const Instruction *at, i64 rows, int me, int threads) {
  const i64 width = at->a[3], kind = at->a[4], pieces = (width + 63) / 64, stride = at->a[5];
  for (i64 i = me; i < rows * pieces; i += threads) {
    const i64 row = i / pieces, from = i % pieces * 64, to = low(width, from + 64);
    const bf16 *g = (const bf16 *)at->a[0] + row * stride, *u = (const bf16 *)at->a[1] + row * stride;
    bf16 *y = (bf16 *)at->a[2] + row * width;
    if (!at->a[1]) {
      for (i64 c = from; c < to; c++) y[c] = put(activated(get(g[c]), kind));
    } else if (kind == SILU) {
#pragma omp simd
      for (i64 c = from; c < to; c++) y[c] = put(get(put(activated(get(g[c]), SILU))) * get(u[c]));
    } else {
      for (i64 c = from; c < to; c++) y[c] = put(get(put(activated(get(g[c]), kind))) * get(u[c]));
    }
  }
}

// Which of 16 rows each adapter has: bit b of owned[adapter MAX_GROUPS + g] is row 16 g + b. Rows
// are those of the step, or of its choice.
static void divide(const Step *step, i64 rows, const int32_t *choice, uint16_t *owned) {
  memset(owned, 0, sizeof(uint16_t) * step->adapters * MAX_GROUPS);
  for (i64 r = 0; r < rows; r++) {
    const int32_t adapter = step->adapter[choice ? choice[r] : r];
    if (adapter >= 0 && adapter < step->adapters)
      owned[adapter * MAX_GROUPS + r / 16] |= (uint16_t)(1 << r % 16);
  }
}

#ifndef ONLY_PORTABLE
// Products [16 ranks][16 rows] go, for the owned rows, to the packed operand of the next product.
static void lower(const float *sums, uint16_t own, bf16 *tile) {
  for (int pair = 0; pair < 8; pair++, sums += 32, tile += 32) {
    const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums)));
    const __m256i half = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + 16));
    const __m512i odd = _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    _mm512_mask_storeu_epi32(tile, own, _mm512_or_si512(even, odd));
  }
}

// y += scale sums, for the owned rows.
static void raise(const float *sums, uint16_t own, float scale, bf16 *y, i64 stride) {
  const __m512 by = _mm512_set1_ps(scale);
  __m512 x[16];
  for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_ps(sums + 16 * i);
  transpose(x);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++)
    if (own >> r & 1) narrow(_mm512_fmadd_ps(x[r], by, widen(y + r * stride)), y + r * stride);
}

// The tiles of 16 rows meet an adapter's matrices together; of the sums, which are each row's own,
// those of the adapter's rows are taken. `small` [parts][MAX_GROUPS][wide] tiles: A x, packed.
static void low_rank_tiles(const Instruction *at, const Step *step, const uint16_t *owned, i64 rows,
                           int me, int threads) {
  const i64 in = at->a[1], count = at->a[3], wide = at->a[5], groups = (rows + 15) / 16;
  const LowPart *parts = (const LowPart *)at->a[2];
  bf16 *small = (bf16 *)at->a[4];
  float sums[256] __attribute__((aligned(64)));
  i64 turn = 0, blocks = 0;
  for (i64 i = 0; i < count; i++) {
    blocks += parts[i].out / 16;
    for (i64 adapter = 0; adapter < step->adapters; adapter++) {
      const LowRank *t = parts[i].terms + adapter;
      const uint16_t *own = owned + adapter * MAX_GROUPS;
      const Part a = {.weight = t->a, .format = BF16};
      for (i64 rank = 0; rank < t->rank; rank += 16)
        for (i64 g = 0; g < groups; g++) {
          if (!own[g] || turn++ % threads != me) continue;
          bf16 *tile = small + ((i * MAX_GROUPS + g) * wide + rank / 32) * TILE;
          products(&a, in, rank, step->pack + g * (in / 32) * TILE, in / 32, 1, 0, sums);
          lower(sums, own[g], tile + rank % 32 * 16);
          memset(sums, 0, sizeof sums);
          if (rank % 32 == 0 && rank + 16 >= t->rank) lower(sums, own[g], tile + 256);
        }
    }
  }
#pragma omp barrier
  for (i64 block = blocks * me / threads; block < blocks * (me + 1) / threads; block++) {
    i64 i = 0, row = block;
    while (row >= parts[i].out / 16) row -= parts[i++].out / 16;
    row *= 16;
    for (i64 adapter = 0; adapter < step->adapters; adapter++) {
      const LowRank *t = parts[i].terms + adapter;
      const i64 steps = (t->rank + 31) / 32, stride = parts[i].stride;
      const uint16_t *own = owned + adapter * MAX_GROUPS;
      const Part b = {.weight = t->b, .format = BF16};
      for (i64 g = 0; t->rank && g < groups; g++) {
        if (!own[g]) continue;
        const bf16 *x = small + (i * MAX_GROUPS + g) * wide * TILE;
        products(&b, 32 * steps, row, x, steps, 1, 0, sums);
        raise(sums, own[g], t->scale, parts[i].y + 16 * g * stride + row, stride);
      }
    }
  }
}
#endif

// (x, in, parts, count, small, wide): y += scale B A x with the terms of each row's adapter. Stands
// behind the linears of the same x, which have packed it.
static void low_rank(const Instruction *at, const Step *step, const uint16_t *owned, i64 rows,
                     int me, int threads) {
#ifndef ONLY_PORTABLE
  if (!step->portable) {
    low_rank_tiles(at, step, owned, rows, me, threads);
    return;
  }
#endif
  const i64 in = at->a[1];
  const LowPart *parts = (const LowPart *)at->a[2];
  for (i64 i = 0; i < at->a[3]; i++)
    for (i64 adapter = 0; adapter < step->adapters; adapter++) {
      const LowRank *t = parts[i].terms + adapter;
      const i64 width = (t->rank + 31) / 32 * 32;
      for (i64 r = me; t->rank && r < rows; r += threads) {
        if (!(owned[adapter * MAX_GROUPS + r / 16] >> r % 16 & 1)) continue;
        const bf16 *x = (const bf16 *)at->a[0] + r * in;
        bf16 *y = parts[i].y + r * parts[i].stride, *low = scratch(2 * t->rank);
        for (i64 k = 0; k < t->rank; k++) low[k] = put(dot(t->a + k * in, x, in));
        for (i64 o = 0; o < parts[i].out; o++)
          y[o] = put(get(y[o]) + t->scale * dot(t->b + o * width, low, t->rank));
      }
    }
}

// (x, V, found int32, peak fp32): the first of the largest of each row; where one is not a number,
// so is the peak
static void best(const Instruction *at, i64 rows, int me, int threads) {
  const i64 width = at->a[1];
  for (i64 r = me; r < rows; r += threads) {
    const bf16 *x = (const bf16 *)at->a[0] + r * width;
    float peak = -INFINITY;
    int odd = 0;
    i64 place = 0;
    for (i64 from = 0; from < width; from += 512) {
      const i64 to = low(width, from + 512);
      float top = -INFINITY;
#pragma omp simd reduction(max : top) reduction(| : odd)
      for (i64 i = from; i < to; i++) {
        const float value = get(x[i]);
        odd |= value != value;
        top = value > top ? value : top;
      }
      if (top > peak) peak = top, place = from;
    }
    while (place < width - 1 && !(get(x[place]) == peak)) place++;
    ((int32_t *)at->a[2])[r] = (int32_t)place;
    ((float *)at->a[3])[r] = odd ? NAN : peak;
  }
}

// (from, to, C): the wanted rows side by side
static void choose(const Instruction *at, const Step *step, int me, int threads) {
  const i64 width = at->a[2];
  for (i64 r = me; r < step->wanted; r += threads)
    memcpy((bf16 *)at->a[1] + r * width, (const bf16 *)at->a[0] + step->choice[r] * width, 2 * width);
}

// (x, y, C, scale): x += scale y
static void add(const Instruction *at, i64 rows, int me, int threads) {
  const i64 width = at->a[2];
  float scale;
  memcpy(&scale, &at->a[3], 4);
  for (i64 r = me; r < rows; r += threads) {
    bf16 *x = (bf16 *)at->a[0] + r * width;
    const bf16 *y = (const bf16 *)at->a[1] + r * width;
#pragma omp simd
    for (i64 c = 0; c < width; c++) x[c] = put(get(x[c]) + get(put(scale * get(y[c]))));
  }
}

// (table, x, C, scale)
static void embed(const Instruction *at, const Step *step, i64 rows, int me, int threads) {
  const i64 width = at->a[2];
  float scale;
  memcpy(&scale, &at->a[3], 4);
  for (i64 r = me; r < rows; r += threads) {
    const bf16 *from = (const bf16 *)at->a[0] + step->ids[r] * width;
    bf16 *to = (bf16 *)at->a[1] + r * width;
    for (i64 c = 0; c < width; c++) to[c] = scale == 1 ? from[c] : put(get(from[c]) * scale);
  }
}

void topwork_decode(const Instruction *program, i64 count, const Step *step) {
  uint16_t *owned = calloc(2 * step->adapters * MAX_GROUPS + 1, sizeof(uint16_t));
  uint16_t *chosen = owned + step->adapters * MAX_GROUPS;
  divide(step, step->rows, NULL, owned);
  divide(step, step->wanted, step->choice, chosen);
#pragma omp parallel num_threads((int)step->threads)
  {
    const int me = omp_get_thread_num(), threads = omp_get_num_threads();
    i64 rows = step->rows;
    const uint16_t *own = owned;
    if (!step->portable) tiles_on();
    for (i64 i = 0; i < count; i++) {
      const Instruction *at = program + i;
      switch (at->op) {
        case EMBED: embed(at, step, rows, me, threads); break;
        case NORM: norm(at, rows, me, threads); break;
        case LINEARS: linears(at, step, rows, me, threads); break;
        case ROTARY: rotary(at, step, rows, me, threads); break;
        case APPEND: append(at, step, rows, me, threads); break;
        case ATTEND: attend(at, step, rows, me, threads); break;
        case GATE: gate(at, rows, me, threads); break;
        case LOW_RANK: low_rank(at, step, own, rows, me, threads); break;
        case ADD: add(at, rows, me, threads); break;
        case BEST: best(at, rows, me, threads); break;
        case SELECT:
          choose(at, step, me, threads);
          rows = step->wanted, own = chosen;
          break;
      }
#pragma omp barrier
    }
    if (!step->portable) tiles_off();
  }
  free(owned);
}
