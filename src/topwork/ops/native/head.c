// Log-probabilities of given tokens and their gradient, as attention of the hidden states to the
// rows of the head: softmax(h Wᵀ) W is what attention with keys and values W computes, so that
// logits exist only as small blocks and stay fp32.
//
// N rows h [N, C], head W [V, C], C a multiple of 32. Threads divide the vocabulary and merge.
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "tiles.h"

#include <math.h>
#include <omp.h>

enum { ROOM = 512 * 576 /* bf16 of W that stay in the second-level cache, twice */ };

typedef struct {
  float *top, *total, *sums;  // of one thread: [N], [N], [N, C]
} Part;

static Part part_of(float *all, int64_t thread, int64_t N, int64_t C, int want) {
  float *at = all + thread * N * (2 + (want ? C : 0));
  return (Part){at, at + N, at + 2 * N};
}

static float dot(const bf16 *a, const bf16 *b, int64_t C) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < C; c += 16) sum = _mm512_fmadd_ps(widen(a + c), widen(b + c), sum);
  return _mm512_reduce_add_ps(sum);
}

// Fold the vocabulary [from, to) into `part`; `h` has whole steps of rows.
static void fold_words(const Part *part, const bf16 *h, const bf16 *w, int64_t N, int64_t C,
                       int64_t from, int64_t to, int want) {
  const int64_t keys = smaller(512, larger(STEP, ROOM / C / STEP * STEP));
  const int64_t across = C / 32 * TILE, along = C / 16 * TILE;
  bf16 *columns = scratch(OWN, 4 * keys * C + 6 * STEP * keys);
  bf16 *pairs = columns + keys * C, *P = pairs + keys * C;
  float *S = (float *)(P + STEP * keys);
  for (int64_t at = from; at < to; at += keys) {
    const int64_t real = smaller(keys, to - at), count = up(real);
    pack_columns(columns, w + at * C, C, real, C);
    if (want) pack_pairs(pairs, w + at * C, C, real, C, 0);
    for (int64_t n = 0; n < N; n += STEP) {
      const bf16 *rows = h + n * C;
      float *o = part->sums + n * C;
      for (int64_t k = 0; k < count; k += STEP) {
        const bf16 *b = columns + k / 16 * across;
        product(S + k, keys, rows, rows + 16 * C, C, 32, b, b + across, TILE, C / 32, 0);
      }
      for (int64_t r = 0; r < STEP; r++)
        fold_row(S + r * keys, P + r * keys, count, 0, real, 1.44269504f, part->top + n + r,
                 part->total + n + r, o + r * C, want ? C : 0);
      for (int64_t c = 0; want && c < C; c += 32) {
        const bf16 *b = pairs + c / 16 * TILE;
        product(o + c, C, P, P + 16 * keys, keys, 32, b, b + TILE, along, count / 32, 1);
      }
    }
  }
}

// found [N]: log softmax(h Wᵀ)[target]; grad [N, C], if `want`: its gradient W[target] - softmax W.
void topwork_head(const bf16 *h, const bf16 *w, const int64_t *targets, float *found, bf16 *grad,
                  int64_t N, int64_t V, int64_t C, int64_t want) {
  const int64_t whole = up(N), threads = omp_get_max_threads(), share = up((V + threads - 1) / threads);
  float *all = scratch(SHARED, 4 * threads * whole * (2 + (want ? C : 0)) + 2 * whole * C);
  bf16 *rows = (bf16 *)(all + threads * whole * (2 + (want ? C : 0)));
  pack_rows(rows, h, C, N, C);
#pragma omp parallel num_threads(threads)
  {
    tiles_on();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < threads; i++) {
      const Part part = part_of(all, i, whole, C, want);
      for (int64_t n = 0; n < whole; n++) part.top[n] = -1e30f, part.total[n] = 0;
      if (want) memset(part.sums, 0, 4 * whole * C);
      fold_words(&part, rows, w, whole, C, i * share, smaller(V, (i + 1) * share), want);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < N; n++) {
      float top = -1e30f, total = 0;
      for (int64_t i = 0; i < threads; i++) {
        const float one = part_of(all, i, whole, C, want).top[n];
        top = one > top || one != one ? one : top;
      }
      for (int64_t i = 0; i < threads; i++) {
        const Part part = part_of(all, i, whole, C, want);
        total += part.total[n] * exp2f(part.top[n] - top);
      }
      const bf16 *own = w + targets[n] * C;
      found[n] = dot(h + n * C, own, C) - (top + log2f(total)) * 0.69314718f;
      for (int64_t c = 0; want && c < C; c += 16) {
        __m512 y = widen(own + c);
        for (int64_t i = 0; i < threads; i++) {
          const Part part = part_of(all, i, whole, C, want);
          const __m512 by = _mm512_set1_ps(exp2f(part.top[n] - top) / total);
          y = _mm512_fnmadd_ps(by, _mm512_loadu_ps(part.sums + n * C + c), y);
        }
        _mm256_storeu_si256((__m256i *)(grad + n * C + c), narrow(y));
      }
    }
    _tile_release();
  }
}
#endif
