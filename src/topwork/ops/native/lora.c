// The thin products of LoRA in bf16 on AMX tiles, each reading its large operand once:
//
//   down        low = drop(x) Aᵀ
//   up_grads    ups = dy (s B),  dB = s dyᵀ low
//   down_grads  dA = upsᵀ drop(x),  dx += drop'(ups A)
//
//   row_norms   ‖W + s B A‖ of each row, given W Aᵀ, A Aᵀ and ‖W‖²
//   gained      dz = dy gain, dgain = Σ dy z over the tokens
//
// T tokens, C inputs and N outputs (multiples of 32), R rows of the stacked A, r of one. The mask
// of `drop` is the one of elementwise.c. Sums over tokens go thread by thread in fixed order.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "tiles.h"

#include <omp.h>

typedef struct {
  uint32_t key0, key1, least;  // least 0: nothing is dropped
} Draw;

static Draw drawn(int64_t key, int64_t threshold) {
  return (Draw){(uint32_t)key, (uint32_t)(key >> 32), (uint32_t)threshold};
}

// Which of the 32 elements from 2 `counter` stay.
static inline __mmask32 kept(uint32_t counter, const Draw *d) {
  const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i h = _mm512_add_epi32(_mm512_set1_epi32(counter), order);
  h = _mm512_mullo_epi32(h, _mm512_set1_epi32(0x9e3779b1u));
  h = _mm512_add_epi32(h, _mm512_set1_epi32(d->key0));
  h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
  h = _mm512_mullo_epi32(h, _mm512_set1_epi32(0x85ebca6bu));
  h = _mm512_xor_si512(h, _mm512_set1_epi32(d->key1));
  h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 13));
  h = _mm512_mullo_epi32(h, _mm512_set1_epi32(0xc2b2ae35u));
  h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
  if (d->least > 0xffff) return 0;
  return _mm512_cmpge_epu16_mask(h, _mm512_set1_epi16((short)d->least));
}

// 32 rows of x from `row` with the dropped elements zero; `bits` (if any) tells which stayed.
static void thin(bf16 *to, uint32_t *bits, const bf16 *x, int64_t row, int64_t T, int64_t C,
                 const Draw *d) {
  for (int64_t r = 0; r < STEP; r++, to += C) {
    if (row + r >= T) {
      memset(to, 0, 2 * C);
      if (bits) memset(bits + r * (C / 32), 0, C / 8);
      continue;
    }
    const bf16 *from = x + (row + r) * C;
    for (int64_t c = 0; c < C; c += 32) {
      __mmask32 stay = d->least ? kept((uint32_t)(((row + r) * C + c) / 2), d) : 0xffffffffu;
      _mm512_store_si512(to + c, _mm512_maskz_mov_epi16(stay, _mm512_loadu_si512(from + c)));
      if (bits) bits[r * (C / 32) + c / 32] = stay;
    }
  }
}

// Copy [rows, width] into [32, wide], zero elsewhere.
static void pad(bf16 *to, int64_t wide, const bf16 *x, int64_t ld, int64_t rows, int64_t width) {
  memset(to, 0, 2 * STEP * wide);
  for (int64_t r = 0; r < rows; r++) memcpy(to + r * wide, x + r * ld, 2 * width);
}

// x [T, C], a [R, C], low [T, R]; what stays of x is multiplied by scale.
void topwork_lora_down(const bf16 *x, const bf16 *a, bf16 *low, int64_t T, int64_t C, int64_t R,
                       int64_t key, int64_t threshold, float scale) {
  const Draw draw = drawn(key, threshold);
  const int64_t wide = up(R), across = C / 32 * TILE;
  bf16 *packed = scratch(SHARED, 2 * wide * C);
  pack_columns(packed, a, C, R, C);
#pragma omp parallel
  {
    tiles_on();
    float *S = scratch(OWN, 4 * STEP * wide + 2 * STEP * C);
    bf16 *xs = (bf16 *)(S + STEP * wide);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t += STEP) {
      thin(xs, 0, x, t, T, C, &draw);
      for (int64_t r = 0; r < wide; r += 32) {
        const bf16 *b = packed + r / 16 * across;
        product(S + r, wide, xs, xs + 16 * C, C, 32, b, b + across, TILE, C / 32, 0);
      }
      for (int64_t i = 0; i < STEP && t + i < T; i++)
        for (int64_t r = 0; r < R; r += 16) {
          __m512 y = _mm512_mul_ps(_mm512_load_ps(S + i * wide + r), _mm512_set1_ps(scale));
          _mm256_mask_storeu_epi16(low + (t + i) * R + r, lanes(0, R - r), narrow(y));
        }
    }
    _tile_release();
  }
}

// Tiles [N/32][wide/16] of "pairs" of s B, b [N, r] fp32.
static void pack_scaled(bf16 *to, const float *b, int64_t N, int64_t r, int64_t wide, float s) {
  const __m512 by = _mm512_set1_ps(s);
  for (int64_t n = 0; n < N; n += 32)
    for (int64_t c = 0; c < wide; c += 16, to += TILE)
      for (int64_t p = 0; p < 16; p++) {
        const __mmask16 own = lanes(0, r - c);
        const float *even = b + (n + 2 * p) * r + c;
        __m256i x = narrow(_mm512_mul_ps(_mm512_maskz_loadu_ps(own, even), by));
        __m256i y = narrow(_mm512_mul_ps(_mm512_maskz_loadu_ps(own, even + r), by));
        _mm512_store_si512(to + 32 * p, _mm512_or_si512(_mm512_cvtepu16_epi32(x),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16)));
      }
}

// dy [T, N], b [N, r]; low and ups are columns of [T, ld]; db [N, r].
void topwork_lora_up_grads(const bf16 *dy, const bf16 *low, const float *b, bf16 *ups, float *db,
                           int64_t T, int64_t N, int64_t r, int64_t ld, float scale) {
  const int64_t wide = up(r), along = wide / 16 * TILE, threads = omp_get_max_threads();
  float *sums = scratch(SHARED, 4 * threads * wide * N + 2 * wide * N);
  bf16 *packed = (bf16 *)(sums + threads * wide * N);
  pack_scaled(packed, b, N, r, wide, scale);
  memset(sums, 0, 4 * threads * wide * N);
#pragma omp parallel num_threads(threads)
  {
    tiles_on();
    float *S = scratch(OWN, 4 * STEP * wide + 2 * STEP * (N + 2 * wide) + 4 * TILE);
    bf16 *rows = (bf16 *)(S + STEP * wide), *some = rows + STEP * N, *turned = some + STEP * wide;
    bf16 *pairs = turned + STEP * wide;
    float *sum = sums + omp_get_thread_num() * wide * N;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t += STEP) {
      const int64_t count = smaller(STEP, T - t);
      const bf16 *g = dy + t * N;
      if (count < STEP) pack_rows(rows, g, N, count, N), g = rows;
      for (int64_t c = 0; c < wide; c += 32) {
        const bf16 *w = packed + c / 16 * TILE;
        product(S + c, wide, g, g + 16 * N, N, 32, w, w + TILE, along, N / 32, 0);
      }
      for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < r; c += 16)
          _mm256_mask_storeu_epi16(ups + (t + i) * ld + c, lanes(0, r - c),
                                   narrow(_mm512_load_ps(S + i * wide + c)));
      pad(some, wide, low + t * ld, ld, count, r);
      pack_pairs(turned, some, wide, STEP, wide, 1);
      for (int64_t n = 0; n < N; n += 32) {
        pack_pairs(pairs, g + n, N, STEP, 32, 0);
        for (int64_t c = 0; c < r; c += 16)
          multiply(0, sum + c * N + n, N, turned + c / 16 * TILE, 0, 32, 0, pairs, pairs + TILE, 0,
                   1, 1);
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++)
      for (int64_t c = 0; c < r; c++) {
        float total = 0;
        for (int64_t i = 0; i < threads; i++) total += sums[(i * wide + c) * N + n];
        db[n * r + c] = total * scale;
      }
    _tile_release();
  }
}

// x [T, C], ups [T, R], a [R, C], dx [T, C] if `want` (it is added to), da [R, C].
void topwork_lora_down_grads(const bf16 *x, const bf16 *ups, const bf16 *a, bf16 *dx, float *da,
                             int64_t T, int64_t C, int64_t R, int64_t want, int64_t key,
                             int64_t threshold, float scale) {
  const Draw draw = drawn(key, threshold);
  const int64_t wide = up(R), threads = omp_get_max_threads(), along = C / 16 * TILE;
  float *sums = scratch(SHARED, 4 * threads * wide * C + 2 * wide * C);
  bf16 *packed = (bf16 *)(sums + threads * wide * C);
  pack_pairs(packed, a, C, R, C, 0);
  memset(sums, 0, 4 * threads * wide * C);
#pragma omp parallel num_threads(threads)
  {
    tiles_on();
    float *S = scratch(OWN, 4 * STEP * C + 2 * STEP * (C + 2 * wide) + 4 * TILE + C * STEP / 8);
    bf16 *xs = (bf16 *)(S + STEP * C), *some = xs + STEP * C, *turned = some + STEP * wide;
    bf16 *pairs = turned + STEP * wide;
    uint32_t *bits = (uint32_t *)(pairs + 2 * TILE);
    float *sum = sums + omp_get_thread_num() * wide * C;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t += STEP) {
      const int64_t count = smaller(STEP, T - t);
      thin(xs, bits, x, t, T, C, &draw);
      pad(some, wide, ups + t * R, R, count, R);
      pack_pairs(turned, some, wide, STEP, wide, 1);
      for (int64_t c = 0; c < C; c += 32) {
        pack_pairs(pairs, xs + c, C, STEP, 32, 0);
        for (int64_t r = 0; r < R; r += 16)
          multiply(0, sum + r * C + c, C, turned + r / 16 * TILE, 0, 32, 0, pairs, pairs + TILE, 0,
                   1, 1);
        if (want) {
          const bf16 *w = packed + c / 16 * TILE;
          product(S + c, C, some, some + 16 * wide, wide, 32, w, w + TILE, along, wide / 32, 0);
        }
      }
      for (int64_t i = 0; want && i < count; i++)
        for (int64_t c = 0; c < C; c += 16) {
          bf16 *to = dx + (t + i) * C + c;
          __mmask16 stay = bits[i * (C / 32) + c / 32] >> (c % 32);
          __m512 y = _mm512_maskz_mul_ps(stay, _mm512_load_ps(S + i * C + c),
                                         _mm512_set1_ps(scale));
          _mm256_storeu_si256((__m256i *)to, narrow(_mm512_add_ps(widen(to), y)));
        }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < R * C; i++) {
      float total = 0;
      for (int64_t j = 0; j < threads; j++) total += sums[j * wide * C + i];
      da[i] = total * scale;
    }
    _tile_release();
  }
}

// cross [N, r], b [N, r], gram [r, r], own and norms [N].
void topwork_lora_row_norms(const bf16 *cross, const float *b, const float *gram, const float *own,
                            float *norms, int64_t N, int64_t r, float scale) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n++) {
    const float *row = b + n * r;
    float along = 0, square = 0;
    for (int64_t j = 0; j < r; j++) {
      float sum = 0;
      for (int64_t i = 0; i < r; i++) sum += row[i] * gram[j * r + i];
      square += row[j] * sum;
      uint32_t bits = (uint32_t)cross[n * r + j] << 16;
      float seen;
      memcpy(&seen, &bits, 4);
      along += row[j] * seen;
    }
    const float all = own[n] + 2 * scale * along + scale * scale * square;
    norms[n] = __builtin_sqrtf(all > 0 ? all : 0);
  }
}

// dy, z and dz [T, N]; gain and dgain [N].
void topwork_lora_gained(const bf16 *dy, const bf16 *z, const float *gain, bf16 *dz, float *dgain,
                         int64_t T, int64_t N) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < N; n += 32) {
    const __m512 low = _mm512_loadu_ps(gain + n), high = _mm512_loadu_ps(gain + n + 16);
    __m512 a = _mm512_setzero_ps(), b = a;
    for (int64_t t = 0; t < T; t++) {
      const bf16 *g = dy + t * N + n, *y = z + t * N + n;
      const __m512 one = widen(g), two = widen(g + 16);
      a = _mm512_fmadd_ps(one, widen(y), a);
      b = _mm512_fmadd_ps(two, widen(y + 16), b);
      _mm256_storeu_si256((__m256i *)(dz + t * N + n), narrow(_mm512_mul_ps(one, low)));
      _mm256_storeu_si256((__m256i *)(dz + t * N + n + 16), narrow(_mm512_mul_ps(two, high)));
    }
    _mm512_storeu_ps(dgain + n, a);
    _mm512_storeu_ps(dgain + n + 16, b);
  }
}
#endif
