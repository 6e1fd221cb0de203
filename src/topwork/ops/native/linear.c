// Products of many rows with frozen weights, bf16 on AMX tiles, as a sum of parts in one pass:
//
//   y [T, N] (+)= Σ a [T, K] · w + bias      w as [N, K] lies (its transpose), or, `turned`, [K, N]
//
// so that a low-rank term, or the gradients of several linears of one input, cost no pass of their
// own. N is a multiple of 32. The weights of some strips of 32 columns are packed; of these at most
// CHUNK steps of 32 stay in the second-level cache while TALL rows go by, 32 at a time: they stay in
// the first level, past which the weights stream. Sums wait in fp32 for the next chunk.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "tiles.h"

#include <omp.h>

enum { CHUNK = 20, TALL = 256, PANEL = 720 << 10, BLOCK = 32 * 32, MOST = 1024 };

typedef struct {
  const bf16 *a;
  const void *w;     // bf16, or float if `wide`
  int64_t lda, K;
  float scale;       // of a wide w
  int32_t wide;
} Part;

typedef struct {
  int part, steps, ends;  // ends: sums are put away behind it
  int64_t from, at;       // the first column of `a`; the first step in a strip of the panel
} Segment;

static int cut(const Part *parts, int64_t count, Segment *segments) {
  int made = 0, held = 0;
  int64_t at = 0;
  for (int p = 0; p < count; p++) {
    const int64_t steps = up(parts[p].K) / 32, pieces = (steps + CHUNK - 1) / CHUNK;
    const int64_t size = pieces ? (steps + pieces - 1) / pieces : 0;
    for (int64_t s = 0; s < steps; s += size) {
      const int now = (int)smaller(size, steps - s);
      if (made && held + now > CHUNK) segments[made - 1].ends = 1, held = 0;
      segments[made++] = (Segment){p, now, 0, 32 * s, at + s};
      held += now;
    }
    at += steps;
  }
  segments[made - 1].ends = 1;
  return made;
}

static inline __m512i wide_row(const float *w, int64_t n, float scale) {
  const __m512 by = _mm512_set1_ps(scale);
  __m512 a = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(0, n), w), by);
  __m512 b = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(0, n - 16), w + 16), by);
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a)), narrow(b), 1);
}

// Columns [n, n + 32) of the product as tiles [K/32][2].
static void pack_strip(bf16 *to, const Part *p, int64_t N, int64_t n, int turned) {
  if (turned) {
    pack_pairs(to, (const bf16 *)p->w + n, N, p->K, 32, 0);
    return;
  }
  for (int64_t k = 0; k < p->K; k += 32)
    for (int64_t i = n; i < n + 32; i += 16, to += TILE) {
      const int64_t left = p->K - k;
      const __mmask32 own = left < 32 ? (1u << left) - 1 : 0xffffffffu;
      __m512i r[16];
      for (int j = 0; j < 16; j++) {
        const int64_t at = (i + j) * p->K + k;
        r[j] = p->wide ? wide_row((const float *)p->w + at, left, p->scale)
                       : _mm512_maskz_loadu_epi16(own, (const bf16 *)p->w + at);
      }
      transpose16(r);
      for (int j = 0; j < 16; j++) _mm512_store_si512(to + 32 * j, r[j]);
    }
}

static inline void sums_out(float *c) {
  _tile_stored(0, c, 64);
  _tile_stored(1, c + 256, 64);
  _tile_stored(2, c + 512, 64);
  _tile_stored(3, c + 768, 64);
}

static inline void sums_in(const float *c) {
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + 256, 64);
  _tile_loadd(2, c + 512, 64);
  _tile_loadd(3, c + 768, 64);
}

static inline void steps_of(const bf16 *a, int64_t lda, const bf16 *b, int steps) {
  const bf16 *below = a + 16 * lda;
  for (int s = 0; s < steps; s++, a += 32, below += 32, b += 2 * TILE) {
    _tile_stream_loadd(6, b, 64);
    _tile_loadd(4, a, lda * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, b + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, below, lda * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// 32 sums of a row, c and c + 256, to y; with its bias, and added to what is there.
static inline void row_out(bf16 *y, const float *c, const bf16 *bias, int64_t add) {
  __m512 low = _mm512_load_ps(c), high = _mm512_load_ps(c + 256);
  if (bias) low = _mm512_add_ps(low, widen(bias)), high = _mm512_add_ps(high, widen(bias + 16));
  if (add) low = _mm512_add_ps(low, widen(y)), high = _mm512_add_ps(high, widen(y + 16));
  _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// 32 rows from `t` of what a segment reads; copied to where zeros fill them up, if they are short.
static const bf16 *rows_of(const Part *p, const Segment *s, int64_t t, int64_t rows, bf16 *to,
                           int64_t *lda) {
  const int64_t width = smaller(32 * s->steps, p->K - s->from);
  const bf16 *a = p->a + t * p->lda + s->from;
  *lda = p->lda;
  if (rows == STEP && width == 32 * s->steps) return a;
  *lda = 32 * s->steps;
  memset(to, 0, 2 * STEP * *lda);
  for (int64_t r = 0; r < rows; r++) memcpy(to + r * *lda, a + r * p->lda, 2 * width);
  return to;
}

// Rows [from, to) of `some` strips from column n, whose packed weights lie in `panel`.
static void strips_of(const Part *parts, const Segment *segments, int made, const bf16 *panel,
                      int64_t strip, int64_t some, bf16 *y, const bf16 *bias, int64_t N, int64_t n,
                      int64_t from, int64_t to, int64_t add, float *sums, bf16 *padded) {
  for (int i = 0, first = 0; i < made; first = ++i) {
    while (!segments[i].ends) i++;
    for (int64_t t = from; t < to; t += STEP) {
      const int64_t rows = smaller(STEP, to - t);
      const bf16 *a[CHUNK];
      int64_t lda[CHUNK];
      for (int j = first; j <= i; j++)
        a[j - first] = rows_of(parts + segments[j].part, segments + j, t, rows,
                               padded + STEP * 32 * (segments[j].at - segments[first].at),
                               lda + j - first);
      for (int64_t s = 0; s < some; s++) {
        float *c = sums + (first || i + 1 < made ? ((t - from) / STEP * some + s) * BLOCK : 0);
        if (first) {
          sums_in(c);
        } else {
          _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        }
        for (int j = first; j <= i; j++)
          steps_of(a[j - first], lda[j - first], panel + s * strip + segments[j].at * 2 * TILE,
                   segments[j].steps);
        sums_out(c);
        for (int64_t r = 0; i + 1 == made && r < rows; r++)
          row_out(y + (t + r) * N + n + 32 * s, c + r / 16 * 512 + r % 16 * 16,
                  bias ? bias + n + 32 * s : 0, add);
      }
    }
  }
}

void topwork_linear(const Part *parts, int64_t count, bf16 *y, const bf16 *bias, int64_t T,
                    int64_t N, int64_t turned, int64_t add) {
  Segment segments[MOST];
  const int made = cut(parts, count, segments);
  const Segment *end = segments + made - 1;
  const int64_t steps = end->at + end->steps, strip = steps * 2 * TILE;
  const int64_t most = smaller(N / 32, PANEL / (2 * smaller(steps, CHUNK) * 2 * TILE));
  const int64_t threads = omp_get_max_threads(), share = up((T + threads - 1) / threads);
  const int64_t tall = smaller(TALL, share);
  bf16 *panel = scratch(SHARED, 2 * most * strip);
#pragma omp parallel num_threads(threads)
  {
    tiles_on();
    float *sums = scratch(OWN, 4 * BLOCK * most * (tall / STEP) + 2 * STEP * 32 * CHUNK);
    bf16 *padded = (bf16 *)(sums + BLOCK * most * (tall / STEP));
    for (int64_t n = 0; n < N; n += 32 * most) {
      const int64_t some = smaller(most, (N - n) / 32);
#pragma omp for schedule(static)
      for (int64_t s = 0; s < some; s++)
        for (int i = 0; i < made; i++)
          if (segments[i].from == 0)
            pack_strip(panel + s * strip + segments[i].at * 2 * TILE, parts + segments[i].part, N,
                       n + 32 * s, turned);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < T; t += tall)
        strips_of(parts, segments, made, panel, strip, some, y, bias, N, n, t, smaller(T, t + tall),
                  add, sums, padded);
    }
    _tile_release();
  }
}
#endif
