// Causal (or full) attention of packed documents in bf16 on AMX tiles, forward and backward,
// after FlashAttention (arXiv:2205.14135, 2307.08691): scores live in a small block, never whole.
//
// Letters: T rows of all documents, n rows of one, H heads, K key/value heads, D head size (a
// multiple of 32). Scores are kept in base 2: exp(x) = 2^(x log2 e).
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

enum { KEYS = 256, SIDE = 128 };

int topwork_amx(void) {
  enum { REQUEST = 0x1023, TILE_DATA = 18 };  // arch_prctl(ARCH_REQ_XCOMP_PERM, …)
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

typedef struct {
  int64_t n, causal, window;  // window 0: none
} Span;

// Keys [from, to) that query i sees.
static inline int64_t seen_from(const Span *s, int64_t i) {
  return s->window ? larger(0, i - s->window + 1) : 0;
}
static inline int64_t seen_to(const Span *s, int64_t i) {
  if (s->causal) return smaller(i + 1, s->n);
  return s->window ? smaller(s->n, i + s->window) : s->n;
}

// 32 queries of one head against the packed keys and values of their document.
static void forward_rows(const bf16 *q, int64_t ldq, const bf16 *kc, const bf16 *vp, bf16 *out,
                         int64_t ldo, float *lse, const Span *span, int64_t row, int D,
                         float scale) {
  float *S = scratch(OWN, 4 * STEP * KEYS + 2 * STEP * KEYS + 2 * STEP * D + 4 * STEP * D + 8 * STEP);
  float *O = S + STEP * KEYS, *top = O + STEP * D, *total = top + STEP;
  bf16 *P = (bf16 *)(total + STEP), *Q = P + STEP * KEYS;
  int64_t rows = smaller(STEP, span->n - row), last = row + rows - 1;
  pack_rows(Q, q + row * ldq, ldq, rows, D);
  memset(O, 0, 4 * STEP * D);
  for (int r = 0; r < STEP; r++) { top[r] = -1e30f; total[r] = 0; }
  int64_t stop = up(seen_to(span, last));
  for (int64_t at = seen_from(span, row) / STEP * STEP; at < stop; at += KEYS) {
    int64_t count = smaller(KEYS, stop - at);
    for (int64_t c = 0; c < count; c += STEP) {
      const bf16 *b = kc + (at + c) / 16 * (D / 32) * TILE;
      product(S + c, KEYS, Q, Q + 16 * D, D, 32, b, b + (D / 32) * TILE, TILE, D / 32, 0);
    }
    for (int r = 0; r < STEP; r++) {
      const int64_t i = smaller(row + r, span->n - 1);
      fold_row(S + r * KEYS, P + r * KEYS, count, seen_from(span, i) - at, seen_to(span, i) - at,
               scale, top + r, total + r, O + r * D, D);
    }
    for (int d = 0; d < D; d += 32) {
      const bf16 *b = vp + (at / 32 * (D / 16) + d / 16) * TILE;
      product(O + d, D, P, P + 16 * KEYS, KEYS, 32, b, b + TILE, (D / 16) * TILE, count / 32, 1);
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    __m512 by = _mm512_set1_ps(1.0f / total[r]);
    for (int d = 0; d < D; d += 16)
      _mm256_storeu_si256((__m256i *)(out + (row + r) * ldo + d),
                          narrow(_mm512_mul_ps(_mm512_load_ps(O + r * D + d), by)));
    lse[row + r] = top[r] + __builtin_log2f(total[r]);
  }
}

typedef struct {
  int64_t docs, H, K, D, ldq, ldk, ldv, causal, window;
  float scale;
} Call;

// starts [docs + 1]; out [T, H, D]; lse [H, T] in base 2; packs: room for 2 (T + 32 docs) K D bf16.
void topwork_attention_forward(const Call *c, const int64_t *starts, const bf16 *q, const bf16 *k,
                               const bf16 *v, bf16 *out, float *lse, bf16 *packs) {
  const int64_t H = c->H, K = c->K, D = c->D, T = starts[c->docs], docs = c->docs;
  const int64_t room = T + STEP * docs;
  const float scale = c->scale * 1.44269504f;
#pragma omp parallel
  {
    tiles_on();
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t d = 0; d < docs; d++)
      for (int64_t g = 0; g < K; g++) {
        int64_t at = starts[d], n = starts[d + 1] - at, home = (at + STEP * d) / STEP * STEP;
        pack_columns(packs + (g * room + home) * D, k + at * c->ldk + g * D, c->ldk, n, D);
        pack_pairs(packs + ((K + g) * room + home) * D, v + at * c->ldv + g * D, c->ldv, n, D, 0);
      }
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t d = 0; d < docs; d++)
      for (int64_t h = 0; h < H; h++) {
        int64_t at = starts[d], n = starts[d + 1] - at, home = (at + STEP * d) / STEP * STEP;
        int64_t g = h / (H / K);
        Span span = {n, c->causal, c->window};
        for (int64_t row = 0; row < n; row += STEP)
          forward_rows(q + at * c->ldq + h * D, c->ldq, packs + (g * room + home) * D,
                       packs + ((K + g) * room + home) * D, out + at * H * D + h * D, H * D,
                       lse + h * T + at, &span, row, D, scale);
      }
    _tile_release();
  }
}

typedef struct {
  bf16 *k, *v, *kt, *qc, *qp, *oc, *op;  // the document's keys, values; queries and dO of one head
  float *dk, *dv, *dq /* [D][n] */, *lse, *delta;
  float *S, *G;                  // [SIDE][SIDE]: scores and their gradient
  bf16 *P, *dS, *dSp;            // [SIDE][SIDE], dSp as tiles of "pairs" [SIDE/32][SIDE/16]
} Work;

// Weights and score gradients of 32 keys (from j) by 32 queries (from i), both transposed.
static void weigh(const Work *w, const Span *span, int64_t j0, int64_t i0, int64_t j, int64_t i,
                  float scale, float scale2) {
  const __m512 by2 = _mm512_set1_ps(scale2), by = _mm512_set1_ps(scale);
  const int64_t last = j + STEP - 1;
  const int whole = last < span->n && (!span->causal || last <= i) &&
                    (!span->window || (i + STEP - 1 - j < span->window &&
                                       (span->causal || last - i < span->window)));
  for (int r = 0; r < STEP; r += 2)
    for (int c = 0; c < STEP; c += 16) {
      __m512i g[2];
      __m512 lse = _mm512_load_ps(w->lse + i + c), delta = _mm512_load_ps(w->delta + i + c);
      for (int e = 0; e < 2; e++) {
        int64_t key = j + r + e, at = (key - j0) * SIDE + i - i0 + c;
        __m512 p = power2(_mm512_fmsub_ps(_mm512_load_ps(w->S + at), by2, lse));
        if (!whole) {  // queries that see this key
          int64_t from = span->causal ? key : span->window ? key - span->window + 1 : 0;
          int64_t to = span->window ? key + span->window : span->n;
          if (key >= span->n) to = 0;
          p = _mm512_maskz_mov_ps(lanes(from - i - c, to - i - c), p);
        }
        __m512 ds = _mm512_sub_ps(_mm512_load_ps(w->G + at), delta);
        ds = _mm512_mul_ps(_mm512_mul_ps(ds, p), by);
        _mm256_store_si256((__m256i *)(w->P + at), narrow(p));
        __m256i half = narrow(ds);
        _mm256_store_si256((__m256i *)(w->dS + at), half);
        g[e] = _mm512_cvtepu16_epi32(half);
      }
      int64_t tile = (j - j0) / 32 * (SIDE / 16) + (i - i0 + c) / 16;
      _mm512_store_si512(w->dSp + tile * TILE + 16 * r,
                         _mm512_or_si512(g[0], _mm512_slli_epi32(g[1], 16)));
    }
}

// Queries [from, to), in whole steps, that see any of the 32 keys from j.
static void seeing(const Span *s, int64_t j, int64_t *from, int64_t *to) {
  *from = s->causal ? j : s->window ? larger(0, j - s->window + 1) / STEP * STEP : 0;
  *to = up(s->window ? smaller(s->n, j + STEP - 1 + s->window) : s->n);
}

// A square of keys from j0 and queries from i0.
static void backward_square(const Work *w, const Span *span, int64_t j0, int64_t i0, int D,
                            float scale) {
  const int64_t np = up(span->n), j1 = smaller(j0 + SIDE, np), i1 = smaller(i0 + SIDE, np);
  const int64_t across = D / 32 * TILE, along = D / 16 * TILE;
  for (int64_t j = j0; j < j1; j += STEP) {
    int64_t from, to;
    seeing(span, j, &from, &to);
    from = larger(from, i0);
    to = smaller(to, i1);
    for (int64_t i = from; i < to; i += STEP) {
      float *S = w->S + (j - j0) * SIDE + i - i0, *G = w->G + (j - j0) * SIDE + i - i0;
      const bf16 *q = w->qc + i / 16 * across, *o = w->oc + i / 16 * across;
      product(S, SIDE, w->k + j * D, w->k + (j + 16) * D, D, 32, q, q + across, TILE, D / 32, 0);
      product(G, SIDE, w->v + j * D, w->v + (j + 16) * D, D, 32, o, o + across, TILE, D / 32, 0);
      weigh(w, span, j0, i0, j, i, scale, scale * 1.44269504f);
    }
    if (from >= to) continue;
    const int64_t at = (j - j0) * SIDE + from - i0;
    for (int d = 0; d < D; d += 32) {
      const bf16 *o = w->op + from / 32 * along + d / 16 * TILE;
      const bf16 *q = w->qp + from / 32 * along + d / 16 * TILE;
      product(w->dv + j * D + d, D, w->P + at, w->P + at + 16 * SIDE, SIDE, 32, o, o + TILE,
              along, (to - from) / 32, 1);
      product(w->dk + j * D + d, D, w->dS + at, w->dS + at + 16 * SIDE, SIDE, 32, q, q + TILE,
              along, (to - from) / 32, 1);
    }
  }
  for (int64_t i = i0; i < i1; i += STEP) {
    int64_t first = j1, end = j0;
    for (int64_t j = j0; j < j1; j += STEP) {
      int64_t from, to;
      seeing(span, j, &from, &to);
      if (from <= i && i < to) { first = smaller(first, j); end = j + STEP; }
    }
    if (first >= end) continue;
    const bf16 *b = w->dSp + ((first - j0) / 32 * (SIDE / 16) + (i - i0) / 16) * TILE;
    for (int d = 0; d < D; d += 32) {
      const bf16 *a = w->kt + first / 32 * along + d / 16 * TILE;
      product(w->dq + d * np + i, np, a, a + TILE, 32, along, b, b + TILE, SIDE / 16 * TILE,
              (end - first) / 32, 1);
    }
  }
}

static Work lay_out(int64_t np, int D) {
  size_t floats = 3 * np * D + 2 * np + 2 * SIDE * SIDE, halves = 7 * np * D + 3 * SIDE * SIDE;
  Work w;
  w.dk = scratch(OWN, 4 * floats + 2 * halves);
  w.dv = w.dk + np * D;
  w.dq = w.dv + np * D;
  w.S = w.dq + np * D;
  w.G = w.S + SIDE * SIDE;
  w.lse = w.G + SIDE * SIDE;
  w.delta = w.lse + np;
  w.k = (bf16 *)(w.delta + np);
  bf16 **parts[] = {&w.v, &w.kt, &w.qc, &w.qp, &w.oc, &w.op, &w.P};
  bf16 *at = w.k;
  for (int i = 0; i < 7; i++) *parts[i] = at += np * D;
  w.dS = w.P + SIDE * SIDE;
  w.dSp = w.dS + SIDE * SIDE;
  return w;
}

// delta = Σ dO · O per row; rows past the end get weights of zero.
static void row_terms(const Work *w, const bf16 *o, const bf16 *g, int64_t ld, const float *lse,
                      int64_t n, int D) {
  for (int64_t i = 0; i < up(n); i++) {
    __m512 sum = _mm512_setzero_ps();
    for (int d = 0; i < n && d < D; d += 16)
      sum = _mm512_fmadd_ps(widen(o + i * ld + d), widen(g + i * ld + d), sum);
    w->delta[i] = _mm512_reduce_add_ps(sum);
    w->lse[i] = i < n ? lse[i] : 1e30f;
  }
}

static void write_turned(bf16 *to, int64_t ld, const float *x, int64_t np, int64_t n, int D) {
  for (int64_t i = 0; i < n; i += 16)
    for (int d = 0; d < D; d += 16) {
      __m512i r[16];
      for (int e = 0; e < 16; e++) r[e] = _mm512_load_si512(x + (d + e) * np + i);
      transpose16(r);
      for (int e = 0; e < 16 && i + e < n; e++)
        _mm256_storeu_si256((__m256i *)(to + (i + e) * ld + d), narrow(_mm512_castsi512_ps(r[e])));
    }
}

static void write_rows(bf16 *to, int64_t ld, const float *x, int64_t n, int D) {
  for (int64_t i = 0; i < n; i++)
    for (int d = 0; d < D; d += 16)
      _mm256_storeu_si256((__m256i *)(to + i * ld + d), narrow(_mm512_load_ps(x + i * D + d)));
}

// out, grad, dq [T, H, D]; dk, dv [T, K, D]; lse as the forward pass left it.
void topwork_attention_backward(const Call *c, const int64_t *starts, const bf16 *q, const bf16 *k,
                                const bf16 *v, const bf16 *out, const float *lse, const bf16 *grad,
                                bf16 *dq, bf16 *dk, bf16 *dv) {
  const int64_t H = c->H, K = c->K, D = c->D, T = starts[c->docs], docs = c->docs;
#pragma omp parallel
  {
    tiles_on();
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t d = 0; d < docs; d++)
      for (int64_t g = 0; g < K; g++) {
        const int64_t at = starts[d], n = starts[d + 1] - at, np = up(n);
        const Span span = {n, c->causal, c->window};
        Work w = lay_out(np, D);
        pack_rows(w.k, k + at * c->ldk + g * D, c->ldk, n, D);
        pack_rows(w.v, v + at * c->ldv + g * D, c->ldv, n, D);
        pack_pairs(w.kt, w.k, D, n, D, 1);
        memset(w.dk, 0, 8 * np * D);
        for (int64_t h = g * (H / K); h < (g + 1) * (H / K); h++) {
          const int64_t here = at * H * D + h * D;
          const bf16 *one = q + at * c->ldq + h * D;
          pack_columns(w.qc, one, c->ldq, n, D);
          pack_pairs(w.qp, one, c->ldq, n, D, 0);
          pack_columns(w.oc, grad + here, H * D, n, D);
          pack_pairs(w.op, grad + here, H * D, n, D, 0);
          row_terms(&w, out + here, grad + here, H * D, lse + h * T + at, n, D);
          memset(w.dq, 0, 4 * np * D);
          for (int64_t j = 0; j < np; j += SIDE) {
            int64_t from, to, end;
            seeing(&span, j, &from, &to);
            seeing(&span, smaller(j + SIDE, np) - STEP, &end, &to);
            for (int64_t i = from / SIDE * SIDE; i < to; i += SIDE)
              backward_square(&w, &span, j, i, D, c->scale);
          }
          write_turned(dq + here, H * D, w.dq, np, n, D);
        }
        write_rows(dk + at * K * D + g * D, K * D, w.dk, n, D);
        write_rows(dv + at * K * D + g * D, K * D, w.dv, n, D);
      }
    _tile_release();
  }
}

#else
int topwork_amx(void) { return 0; }
#endif
