// One token of each row through a decoder that looks at a memory, fp32 or bf16, head included.
//
//   x = x + out(attention(q, k, v of norm(x)));   x = x + out(attention(query of norm(x), memory))
//   x = x + down(act(gate of norm(x)) up)         or with each norm after the addition
//
// Letters: R rows, C hidden, H heads, D head size, W width, V vocabulary, S keys of a text. Weights
// are [out, in]. The keys of a row's own tokens lie where they were made, [R, H, room, D]: `from`
// says which row made the token at each place, so that beams change places without a copy. Those of
// the texts, [texts, H, S, D], are there once for all rows of a text.
//
// What passes between the parts is rounded to the type of the weights as the modules round it; sums
// are fp32. Rows are independent of one another. C, D and W are multiples of 16, R is at most 32: more
// rows come in several calls.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && \
    defined(__AVX512VNNI__)

#include <math.h>
#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "few.h"

enum { SILU, GELU_TANH, GELU, RELU };
enum { BLOCK = 256 /* outputs of the head that are looked at while they are near */, SCREENED = 4, MOST_RANK = 256 };

typedef struct { const void *weight, *bias; } Pair;  // of a linear, or a norm
typedef struct {
  const float *a, *b;  // [rank, in], [rank, out]
  i64 rank;            // 0: there is no such term
  float scale, pad;
} Low;                 // scale · x aᵀ b, which joins a linear's output

typedef struct {
  Pair norms[3], q, k, v, out, query, cross_out, gate, up, down;
  void *keys, *values;
  const void *memory_keys, *memory_values;
  const Low *lows;  // of the nine linears in their order, or null
} Layer;

enum { Q, K_, V_, OUT, QUERY, CROSS_OUT, GATE, UP, DOWN };

typedef struct {
  const Layer *layers;
  const void *words, *places;        // [V, C]; [room, C] or null
  Pair first, last, head;            // norms of the embeddings and of the end, or null
  const void *more;                  // [V], added to the logits, or null
  const float *near;                 // [H, reach] added to scores by distance, or null
  const uint8_t *codes;              // [V up to 16, C]: of the head, by `screen`, or null
  const float *steps, *doubts, *lengths;  // [V]
  float *highest;                    // [SCREENED, V]
  i64 count, hidden, heads, size, width, vocab, room, texts_room, reach, activation;
  i64 centred, before, half, tiles;  // LayerNorm; norms stand before; bf16; AMX
  float eps, scale, word_scale, head_scale;
  void *x, *y, *q, *k, *v, *inner, *open;  // [R, …]
  void *said;                        // [threads, 32 · BLOCK]
  bf16 *packed;                      // [threads, 64 · widest input]
  float *scores;                     // [threads, the largest of both rooms]
} Stack;

typedef struct {
  i64 rows, first, position, threads;  // R rows, which begin with the store's `first`
  const i64 *ids;          // [R]
  int32_t *from;           // [R, room]
  const int32_t *owner;    // [R]: which text
  const int32_t *lengths;  // [texts]
  float *logits;           // [R, V] or null: the largest are enough
  float *peaks;            // [R]: the largest logits
  int32_t *best;           // [R]: and where they first stand
  float *own_peaks;        // [threads, R]: the same of each thread's logits
  int32_t *own_best;
  float *lowest;           // [threads, SCREENED]
  i64 *tried;              // [threads]: logits that were computed in full
} Step;

typedef struct { const Stack *s; const Step *t; i64 me, of; } Crew;
typedef struct { i64 from, to; } Span;

// -- sixteen numbers -----------------------------------------------------------------------------

FLAT char *at(int half, const void *p, i64 i) { return (char *)p + i * (half ? 2 : 4); }
FLAT __m512 widened(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FLAT __m512 load(int half, const void *p, i64 i) {
  const char *from = at(half, p, i);
  return half ? widened(_mm256_loadu_si256((const __m256i *)from)) : _mm512_loadu_ps(from);
}
FLAT void store(int half, void *p, i64 i, __m512 x) {
  if (half) _mm256_storeu_si256((__m256i *)at(half, p, i), (__m256i)_mm512_cvtneps_pbh(x));
  else _mm512_storeu_ps(at(half, p, i), x);
}
FLAT __m512 rounded(int half, __m512 x) {
  return half ? widened((__m256i)_mm512_cvtneps_pbh(x)) : x;
}
#define ALL(x) _mm512_set1_ps(x)

FLAT __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, ALL(-87.0f)), ALL(88.0f));
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, ALL(1.44269504f)), 8);
  __m512 f = _mm512_fmsub_ps(x, ALL(1.44269504f), whole);
  f = _mm512_fmadd_ps(x, ALL(1.9259630e-8f), f);
  __m512 p = ALL(1.5252734e-5f);
  p = _mm512_fmadd_ps(p, f, ALL(1.5403530e-4f));
  p = _mm512_fmadd_ps(p, f, ALL(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, f, ALL(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, ALL(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, ALL(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, ALL(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, ALL(1.0f));
  return _mm512_scalef_ps(p, whole);
}

FLAT __m512 logistic(__m512 x) {
  return _mm512_div_ps(ALL(1.0f), _mm512_add_ps(ALL(1.0f), exponential(_mm512_sub_ps(ALL(0), x))));
}

// x Φ(x); Φ by 7.1.26 of Abramowitz and Stegun, within 1e-7.
FLAT __m512 gelu(__m512 x) {
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), ALL(0.70710678f));
  const __m512 t = _mm512_div_ps(ALL(1.0f), _mm512_fmadd_ps(z, ALL(0.3275911f), ALL(1.0f)));
  __m512 p = ALL(1.061405429f);
  p = _mm512_fmadd_ps(p, t, ALL(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, ALL(1.421413741f));
  p = _mm512_fmadd_ps(p, t, ALL(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, ALL(0.254829592f));
  const __m512 bell = exponential(_mm512_sub_ps(ALL(0), _mm512_mul_ps(z, z)));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), _mm512_mul_ps(bell, ALL(0.5f)));
  const __mmask16 right = _mm512_cmp_ps_mask(x, ALL(0), _CMP_GT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, right, ALL(1.0f), tail));
}

FLAT __m512 activated(i64 kind, __m512 x) {
  if (kind == RELU) return _mm512_max_ps(x, ALL(0));  // of x not a number: ALL(0) stands second
  if (kind == GELU) return gelu(x);
  if (kind == SILU) return _mm512_mul_ps(x, logistic(x));
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 u = _mm512_fmadd_ps(cube, ALL(0.044715f), x);
  return _mm512_mul_ps(x, logistic(_mm512_mul_ps(u, ALL(1.59576912f))));
}

// The sums of sixteen vectors side by side.
FLAT __m512 sums_of(__m512 r[16]) {
  __m512 t[8], u[4], v[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    t[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]),
                         _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(u[2 * i], u[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88),
                       _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

// -- the parts -----------------------------------------------------------------------------------

static Span share_of(const Crew *c, i64 out) {
  const i64 blocks = (out + 15) / 16;
  return (Span){smaller(out, blocks * c->me / c->of * 16),
                smaller(out, blocks * (c->me + 1) / c->of * 16)};
}

// One row of C.
FLAT void norm_row(int half, const Stack *s, const Pair *n, const void *x, void *y) {
  const i64 C = s->hidden;
  __m512 sum = ALL(0), square = ALL(0);
  float mean = 0;
  if (s->centred) {
    for (i64 i = 0; i < C; i += 16) sum = _mm512_add_ps(sum, load(half, x, i));
    mean = _mm512_reduce_add_ps(sum) / C;
  }
  for (i64 i = 0; i < C; i += 16) {
    const __m512 d = _mm512_sub_ps(load(half, x, i), ALL(mean));
    square = _mm512_fmadd_ps(d, d, square);
  }
  const float inverse = 1.0f / sqrtf(_mm512_reduce_add_ps(square) / C + s->eps);
  for (i64 i = 0; i < C; i += 16) {
    const __m512 w = load(half, n->weight, i);
    const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(load(half, x, i), ALL(mean)), ALL(inverse));
    if (s->centred) store(half, y, i, _mm512_fmadd_ps(unit, w, load(half, n->bias, i)));
    else store(half, y, i, _mm512_mul_ps(rounded(half, unit), w));
  }
}

FLAT void norm(int half, const Crew *c, const Pair *n, const void *x, void *y) {
  const i64 C = c->s->hidden;
  for (i64 r = c->me; r < c->t->rows; r += c->of)
    norm_row(half, c->s, n, at(half, x, r * C), at(half, y, r * C));
}

FLAT void embed(int half, const Crew *c) {
  const Stack *s = c->s;
  const i64 C = s->hidden;
  for (i64 r = c->me; r < c->t->rows; r += c->of) {
    void *x = at(half, s->x, r * C);
    for (i64 i = 0; i < C; i += 16) {
      __m512 word = load(half, s->words, c->t->ids[r] * C + i);
      if (s->word_scale != 1) word = rounded(half, _mm512_mul_ps(word, ALL(s->word_scale)));
      if (s->places) word = _mm512_add_ps(word, load(half, s->places, c->t->position * C + i));
      store(half, x, i, word);
    }
    if (s->first.weight) norm_row(half, s, &s->first, x, x);
  }
}

// x for tiles, packed by each thread for itself; null where they do not serve.
FLAT const bf16 *packed_of(int half, const Crew *c, const void *x, i64 in, i64 widest) {
  if (!half || !c->s->tiles || c->t->rows < TALL || in % 32) return 0;
  bf16 *to = c->s->packed + c->me * 64 * widest;
  pack(to, (const bf16 *)x, c->t->rows, in);
  return to;
}

// y += scale · x aᵀ b in this thread's outputs, rounded as the modules do.
FLAT void add_low(int half, const Crew *c, const Low *low, const void *x, i64 in, void *y, i64 out,
                  Span own) {
  float first[MOST_RANK];
  for (i64 r = 0; r < c->t->rows; r++) {
    for (i64 k = 0; k < low->rank; k++) {
      __m512 sum = ALL(0);
      for (i64 i = 0; i < in; i += 16)
        sum = _mm512_fmadd_ps(load(half, x, r * in + i), _mm512_loadu_ps(low->a + k * in + i), sum);
      first[k] = _mm512_cvtss_f32(rounded(half, ALL(_mm512_reduce_add_ps(sum))));
    }
    for (i64 i = own.from; i < own.to; i += 16) {
      __m512 sum = ALL(0);
      for (i64 k = 0; k < low->rank; k++)
        sum = _mm512_fmadd_ps(ALL(first[k]), _mm512_loadu_ps(low->b + k * out + i), sum);
      sum = rounded(half, _mm512_mul_ps(rounded(half, sum), ALL(low->scale)));
      store(half, y, r * out + i, _mm512_add_ps(load(half, y, r * out + i), sum));
    }
  }
}

// This thread's outputs of a linear.
FLAT Span linear(int half, const Crew *c, const Pair *l, const Low *low, const void *x,
                 const bf16 *packed, i64 in, void *y, i64 out) {
  const Part part = {l->weight, l->bias, y, out};
  const Span own = share_of(c, out);
  few(half, &part, x, packed, c->t->rows, in, own.from, own.to);
  if (low && low->rank) add_low(half, c, low, x, in, y, out, own);
  return own;
}

static const Low *low_of(const Layer *l, int which) { return l->lows ? l->lows + which : 0; }

// x += linear(y)
FLAT void add(int half, const Crew *c, const Pair *l, const Low *low, const void *y, i64 in,
              i64 widest) {
  const Stack *s = c->s;
  const bf16 *packed = packed_of(half, c, y, in, widest);
  const Span own = linear(half, c, l, low, y, packed, in, s->open, s->hidden);
  for (i64 r = 0; r < c->t->rows; r++)
    for (i64 i = r * s->hidden + own.from; i < r * s->hidden + own.to; i += 16)
      store(half, s->x, i, _mm512_add_ps(load(half, s->x, i), load(half, s->open, i)));
}

// The products of a query with one key, still in lanes.
FLAT __m512 against(int half, const void *q, const void *key, i64 D) {
  __m512 sum = ALL(0);
  if (!half) {
    for (i64 d = 0; d < D; d += 16) sum = _mm512_fmadd_ps(load(0, q, d), load(0, key, d), sum);
    return sum;
  }
  for (i64 d = 0; d < D; d += 32) {
    const __mmask32 m = D - d < 32 ? 0xffff : ~0u;
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(m, at(1, q, d)),
                           (__m512bh)_mm512_maskz_loadu_epi16(m, at(1, key, d)));
  }
  return sum;
}

// Where the keys of one head lie: that of place t behind `from[t]` times `slots`, or 0.
typedef struct { const void *keys, *values; const int32_t *from; i64 slots, count; } Head;

FLAT i64 place_of(const Head *h, i64 t, i64 D) { return (h->from ? h->from[t] * h->slots : 0) + t * D; }

// scores = exp(scale · q kᵀ + near - the largest); their sum.
FLAT float weigh(int half, const Head *h, const void *q, float scale, const float *near,
                 float *scores, i64 D) {
  const __m512i turn = _mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 top = ALL(-INFINITY), total = ALL(0);
  for (i64 t = 0; t < h->count; t += 16) {
    const i64 left = h->count - t;
    __m512 sums[16];
    if (left >= 16) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++)
        sums[j] = against(half, q, at(half, h->keys, place_of(h, t + j, D)), D);
    } else {
      for (int j = 0; j < 16; j++)
        sums[j] = j < left ? against(half, q, at(half, h->keys, place_of(h, t + j, D)), D) : ALL(0);
    }
    __m512 x = _mm512_mul_ps(sums_of(sums), ALL(scale));
    if (near) {  // by distance, the nearest first
      const i64 last = left - 1;  // the distance of the first of these keys
      const __mmask16 some = last < 15 ? 0xffff << (15 - last) : 0xffff;
      const __m512 terms = _mm512_maskz_loadu_ps(some, near + last - 15);
      x = _mm512_add_ps(x, _mm512_permutexvar_ps(turn, terms));
    }
    x = _mm512_mask_blend_ps(left < 16 ? (1u << left) - 1 : 0xffff, ALL(-INFINITY), x);
    top = _mm512_max_ps(top, x);
    _mm512_storeu_ps(scores + t, x);
  }
  const __m512 most = ALL(_mm512_reduce_max_ps(top));
  for (i64 t = 0; t < h->count; t += 16) {
    const __mmask16 there = h->count - t < 16 ? (1u << (h->count - t)) - 1 : 0xffff;
    const __m512 x = _mm512_maskz_mov_ps(
        there, exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + t), most)));
    total = _mm512_add_ps(total, x);
    _mm512_storeu_ps(scores + t, x);
  }
  return _mm512_reduce_add_ps(total);
}

// y = the values' mean by the weights, in 16 (or, in bf16, 32: even and odd ones) columns at once.
FLAT void gather(int half, const Head *h, const float *weights, float total, void *y, i64 D) {
  const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
  const __m512 whole = ALL(1.0f / total);
  for (i64 first = 0; first < D; first += 64) {
    const i64 wide = smaller(64, D - first);
    __m512 sum[4] = {ALL(0), ALL(0), ALL(0), ALL(0)};
    for (i64 t = 0; t < h->count; t++) {
      const char *value = at(half, h->values, place_of(h, t, D) + first);
      const __m512 weight = ALL(weights[t]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        if (half && i < 2 && 32 * i < wide) {
          const __mmask32 m = wide - 32 * i < 32 ? 0xffff : ~0u;
          const __m512i v = _mm512_maskz_loadu_epi16(m, value + 64 * i);
          const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
          sum[2 * i] = _mm512_fmadd_ps(weight, even, sum[2 * i]);
          const __m512 other = _mm512_castsi512_ps(_mm512_and_si512(v, odd));
          sum[2 * i + 1] = _mm512_fmadd_ps(weight, other, sum[2 * i + 1]);
        }
        if (!half && 16 * i < wide)
          sum[i] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(value + 64 * i), sum[i]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      if (half && i < 2 && 32 * i < wide) {
        __m512i two[2];
        for (int j = 0; j < 2; j++)
          two[j] = _mm512_cvtepu16_epi32(
              (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum[2 * i + j], whole)));
        const __mmask32 m = wide - 32 * i < 32 ? 0xffff : ~0u;
        _mm512_mask_storeu_epi16(at(1, y, first + 32 * i), m,
                                 _mm512_or_si512(two[0], _mm512_slli_epi32(two[1], 16)));
      }
      if (!half && 16 * i < wide) store(0, y, first + 16 * i, _mm512_mul_ps(sum[i], whole));
    }
  }
}

// softmax(scale · q kᵀ + near) v of one head.
FLAT void attend(int half, const Crew *c, const Head *h, const void *q, const float *near,
                 float *scores, void *y) {
  const i64 D = c->s->size;
  if (D == 64) {  // as most have it
    gather(half, h, scores, weigh(half, h, q, c->s->scale, near, scores, 64), y, 64);
  } else {
    gather(half, h, scores, weigh(half, h, q, c->s->scale, near, scores, D), y, D);
  }
}

// Each row's new key and value join its own, which it then looks at.
FLAT void look(int half, const Crew *c, const Layer *l, float *scores) {
  const Stack *s = c->s;
  const i64 H = s->heads, D = s->size, here = c->t->position;
  for (i64 job = c->me; job < c->t->rows * H; job += c->of) {
    const i64 r = job / H, h = job % H, head = h * s->room * D;
    const i64 place = ((c->t->first + r) * H + h) * s->room * D + here * D;
    memcpy(at(half, l->keys, place), at(half, s->k, job * D), D * (half ? 2 : 4));
    memcpy(at(half, l->values, place), at(half, s->v, job * D), D * (half ? 2 : 4));
    const Head one = {at(half, l->keys, head), at(half, l->values, head), c->t->from + r * s->room,
                      H * s->room * D, here + 1};
    attend(half, c, &one, at(half, s->q, job * D), s->near ? s->near + h * s->reach : 0, scores,
           at(half, s->inner, job * D));
  }
}

FLAT void cross(int half, const Crew *c, const Layer *l, float *scores) {
  const Stack *s = c->s;
  const i64 H = s->heads, D = s->size;
  for (i64 job = c->me; job < c->t->rows * H; job += c->of) {
    const i64 text = c->t->owner[job / H], head = (text * H + job % H) * s->texts_room * D;
    const Head one = {at(half, l->memory_keys, head), at(half, l->memory_values, head), 0, 0,
                      c->t->lengths[text]};
    attend(half, c, &one, at(half, s->q, job * D), 0, scores, at(half, s->inner, job * D));
  }
}

// inner = act(gate x) · up x, or act(up x): this thread's part of the width.
FLAT void widen_feed(int half, const Crew *c, const Layer *l, const void *x, i64 widest) {
  const Stack *s = c->s;
  const bf16 *packed = packed_of(half, c, x, s->hidden, widest);
  const Span own =
      linear(half, c, &l->up, low_of(l, UP), x, packed, s->hidden, s->inner, s->width);
  if (l->gate.weight)
    linear(half, c, &l->gate, low_of(l, GATE), x, packed, s->hidden, s->open, s->width);
  for (i64 r = 0; r < c->t->rows; r++)
    for (i64 i = r * s->width + own.from; i < r * s->width + own.to; i += 16) {
      const __m512 up = load(half, s->inner, i);
      if (!l->gate.weight) store(half, s->inner, i, activated(s->activation, up));
      else {
        const __m512 open = rounded(half, activated(s->activation, load(half, s->open, i)));
        store(half, s->inner, i, _mm512_mul_ps(open, up));
      }
    }
}

// 16 of the logits that `few` left in y, or those of them under the mask, with what is added.
FLAT __m512 logits_at(int half, const Stack *s, const void *y, i64 i, i64 o, __mmask16 m) {
  __m512 x, more = ALL(0);
  if (half) {
    x = widened(_mm256_maskz_loadu_epi16(m, at(1, y, i)));
    if (s->more) more = widened(_mm256_maskz_loadu_epi16(m, at(1, s->more, o)));
  } else {
    x = _mm512_maskz_loadu_ps(m, at(0, y, i));
    if (s->more) more = _mm512_maskz_loadu_ps(m, at(0, s->more, o));
  }
  return s->more ? rounded(half, _mm512_add_ps(x, more)) : x;
}

// This thread's logits, block by block: the largest of each row, and all in fp32 where wanted.
FLAT void finish(int half, const Crew *c, i64 widest) {
  const Stack *s = c->s;
  const i64 V = s->vocab, C = s->hidden, R = c->t->rows;
  const bf16 *packed = packed_of(half, c, s->y, C, widest);
  const Span own = share_of(c, V);
  char *said = at(half, s->said, c->me * 32 * BLOCK);
  float *peaks = c->t->own_peaks + c->me * R;
  int32_t *best = c->t->own_best + c->me * R;
  for (i64 r = 0; r < R; r++) peaks[r] = -INFINITY, best[r] = (int32_t)own.from;
  for (i64 o = own.from; o < own.to; o += BLOCK) {
    const i64 n = smaller(BLOCK, own.to - o);
    const Part part = {at(half, s->head.weight, o * C),
                       s->head.bias ? at(half, s->head.bias, o) : 0, said, n};
    few(half, &part, s->y, packed, R, C, 0, n);
    for (i64 r = 0; r < R; r++) {
      __m512 top = ALL(-INFINITY);
      __mmask16 odd = 0;
      for (i64 i = 0; i < n; i += 16) {
        const __mmask16 m = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
        const __m512 x = logits_at(half, s, said, r * n + i, o + i, m);
        if (c->t->logits) _mm512_mask_storeu_ps(c->t->logits + r * V + o + i, m, x);
        odd |= _mm512_mask_cmp_ps_mask(m, x, x, _CMP_UNORD_Q);
        top = _mm512_mask_max_ps(top, m, top, x);
      }
      const float most = odd ? NAN : _mm512_reduce_max_ps(top);
      if (most <= peaks[r] || peaks[r] != peaks[r]) continue;
      peaks[r] = most;
      for (i64 i = 0; i < n; i += 16) {
        const __mmask16 m = n - i < 16 ? (1u << (n - i)) - 1 : 0xffff;
        const __m512 x = logits_at(half, s, said, r * n + i, o + i, m);
        const __mmask16 here = _mm512_mask_cmp_ps_mask(m, x, ALL(most), _CMP_EQ_OQ);
        if (!here) continue;
        best[r] = (int32_t)(o + i + __builtin_ctz(here));
        break;
      }
    }
  }
}

// -- the largest logit in fp32 from a quarter of the head's bytes ----------------------------------
//
// Beside each row w of the head lies a copy of 8 bits, s c, and the hidden state x is split into t y,
// y of 15 bits, and a rest. c y is exact in integers, and
//   |w x - s t c y| <= |w - s c| |x| + |s c| |x - t y|
// bounds each logit. Only those that could be the largest are computed, as `finish` does; what is
// found is what `finish` finds, for the bounds have room for the rounding of either. C is a multiple
// of 64, at most 1024 so that the integers have room.

// codes [V, C] as c + 128, steps s, doubts |w - s c| and lengths |w| [V] of w [V, C].
void topwork_screen(const float *w, uint8_t *codes, float *steps, float *doubts, float *lengths,
                    i64 V, i64 C, i64 threads) {
#ifdef MADV_HUGEPAGE
  const i64 page = 2 << 20, first = ((i64)codes + page - 1) & -page;
  if (first + page < (i64)codes + V * C)
    madvise((void *)first, (i64)codes + V * C - first, MADV_HUGEPAGE);
#endif
#pragma omp parallel for num_threads((int)threads) schedule(static)
  for (i64 o = 0; o < V; o++) {
    const float *row = w + o * C;
    __m512 most = ALL(0), far = ALL(0), square = ALL(0);
    for (i64 i = 0; i < C; i += 16) {
      const __m512 x = _mm512_loadu_ps(row + i);
      most = _mm512_max_ps(most, _mm512_abs_ps(x));
      square = _mm512_fmadd_ps(x, x, square);
      _mm_prefetch((const char *)(row + i) + 8192, _MM_HINT_T0);
    }
    const float top = _mm512_reduce_max_ps(most);
    const int sound = top > 1e-30f && top < 1e30f;
    const float step = sound ? top / 127 : 0, inverse = sound ? 127 / top : 0;
    for (i64 i = 0; i < C; i += 16) {
      const __m512 x = _mm512_loadu_ps(row + i);
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(x, ALL(inverse)));
      const __m512 rest = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(code), ALL(step), x);
      far = _mm512_fmadd_ps(rest, rest, far);
      const __m128i small = _mm512_cvtepi32_epi8(_mm512_add_epi32(code, _mm512_set1_epi32(128)));
      _mm_storeu_si128((__m128i *)(codes + o * C + i), small);
    }
    // The sums that `finish` forms have C / 16 terms in lanes and four more.
    const float slack = (C / 16 + 16) * 1.2e-7f, length = sqrtf(_mm512_reduce_add_ps(square));
    const float doubt = 1.001f * (sqrtf(_mm512_reduce_add_ps(far)) + slack * length);
    steps[o] = step;
    lengths[o] = 1.001f * length;
    doubts[o] = doubt < 1e30f ? doubt : INFINITY;  // of what is no number too
  }
}

// A hidden state as t (128 high + low), which leaves a rest.
typedef struct {
  int8_t high[1024], low[1024];
  i64 highs, lows;  // their sums
  float step, length, rest;
} Digits;

static int digits_of(const float *x, i64 C, Digits *d) {
  __m512 most = ALL(0), square = ALL(0), far = ALL(0);
  for (i64 i = 0; i < C; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    most = _mm512_max_ps(_mm512_abs_ps(v), most);
    square = _mm512_fmadd_ps(v, v, square);
  }
  const float top = _mm512_reduce_max_ps(most), length = sqrtf(_mm512_reduce_add_ps(square));
  if (!(top > 1e-15f && length < 1e15f)) return 0;
  const float step = top / 16256, inverse = 16256 / top;  // 127 · 128
  __m512i highs = _mm512_setzero_si512(), lows = highs;
  for (i64 i = 0; i < C; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(v, ALL(inverse)));
    const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
    const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 7));
    const __m512 rest = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole), ALL(step), v);
    far = _mm512_fmadd_ps(rest, rest, far);
    highs = _mm512_add_epi32(highs, high);
    lows = _mm512_add_epi32(lows, low);
    _mm_storeu_si128((__m128i *)(d->high + i), _mm512_cvtepi32_epi8(high));
    _mm_storeu_si128((__m128i *)(d->low + i), _mm512_cvtepi32_epi8(low));
  }
  d->highs = _mm512_reduce_add_epi32(highs);
  d->lows = _mm512_reduce_add_epi32(lows);
  d->step = step, d->length = 1.0001f * length;
  d->rest = 1.001f * sqrtf(_mm512_reduce_add_ps(far)) + 1e-6f * length;
  return 1;
}

// Sixteen vectors of integers: the sums of each, less `gone`.
FLAT __m512 whole_sums(const __m512i r[16], i64 gone) {
  int32_t sums[16];
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++) sums[j] = _mm512_reduce_add_epi32(r[j]);
  return _mm512_cvtepi32_ps(
      _mm512_sub_epi32(_mm512_loadu_si512(sums), _mm512_set1_epi32((int32_t)gone)));
}

// The bounds of 16 logits of n rows; the largest lower one of each row so far.
FLAT void bound(const Stack *s, const Digits *x, i64 o, __mmask16 m, __m512 *lowest, int n) {
  const i64 C = s->hidden;
  __m512i highs[SCREENED][16], lows[SCREENED][16];
  for (int j = 0; j < 16; j++) {
    const uint8_t *code = s->codes + (o + j) * C;
    __m512i high[SCREENED], low[SCREENED];
    for (int r = 0; r < n; r++) high[r] = low[r] = _mm512_setzero_si512();
    for (i64 i = 0; i < C; i += 64) {
      _mm_prefetch((const char *)code + i + 4096, _MM_HINT_T0);
      const __m512i c = _mm512_loadu_si512(code + i);
#pragma GCC unroll 4
      for (int r = 0; r < n; r++) {
        high[r] = _mm512_dpbusd_epi32(high[r], c, _mm512_loadu_si512(x[r].high + i));
        low[r] = _mm512_dpbusd_epi32(low[r], c, _mm512_loadu_si512(x[r].low + i));
      }
    }
    for (int r = 0; r < n; r++) highs[r][j] = high[r], lows[r][j] = low[r];
  }
  const __m512 step = _mm512_maskz_loadu_ps(m, s->steps + o);
  const __m512 doubt = _mm512_maskz_loadu_ps(m, s->doubts + o);
  const __m512 length = _mm512_add_ps(_mm512_maskz_loadu_ps(m, s->lengths + o), doubt);
  const __m512 more = s->more ? _mm512_maskz_loadu_ps(m, (const float *)s->more + o) : ALL(0);
  for (int r = 0; r < n; r++) {
    const __m512 high = whole_sums(highs[r], 128 * x[r].highs);
    const __m512 whole = _mm512_fmadd_ps(high, ALL(128.0f), whole_sums(lows[r], 128 * x[r].lows));
    const __m512 about = _mm512_mul_ps(_mm512_mul_ps(whole, ALL(x[r].step)), step);
    const __m512 sum = _mm512_add_ps(about, more);
    __m512 far = _mm512_mul_ps(doubt, ALL(x[r].length));
    far = _mm512_fmadd_ps(length, ALL(x[r].rest), far);
    far = _mm512_fmadd_ps(_mm512_add_ps(_mm512_abs_ps(about), _mm512_abs_ps(more)), ALL(5e-7f), far);
    _mm512_mask_storeu_ps(s->highest + r * s->vocab + o, m, _mm512_add_ps(sum, far));
    lowest[r] = _mm512_mask_max_ps(lowest[r], m, _mm512_sub_ps(sum, far), lowest[r]);
  }
}

// Fill `highest` and this thread's `lowest`; whether the rows are sound enough for it.
static int bound_all(const Crew *c) {
  const Stack *s = c->s;
  const int n = (int)c->t->rows;
  const Span own = share_of(c, s->vocab);
  Digits x[SCREENED];
  __m512 lowest[SCREENED];
  for (int r = 0; r < n; r++) {
    if (!digits_of((const float *)s->y + r * s->hidden, s->hidden, x + r)) return 0;
    lowest[r] = ALL(-INFINITY);
  }
  for (i64 o = own.from; o < own.to; o += 16) {
    const __mmask16 m = own.to - o < 16 ? (1u << (own.to - o)) - 1 : 0xffff;
    switch (n) {
      case 1: bound(s, x, o, m, lowest, 1); break;
      case 2: bound(s, x, o, m, lowest, 2); break;
      case 3: bound(s, x, o, m, lowest, 3); break;
      case 4: bound(s, x, o, m, lowest, 4); break;
    }
  }
  for (int r = 0; r < n; r++)
    c->t->lowest[c->me * SCREENED + r] = _mm512_reduce_max_ps(lowest[r]);
  return 1;
}

// The largest of this thread's logits that could be the largest of all.
static void try(const Crew *c) {
  const Stack *s = c->s;
  const i64 V = s->vocab, C = s->hidden, R = c->t->rows;
  const Span own = share_of(c, V);
  i64 tried = 0;
  for (i64 r = 0; r < R; r++) {
    float least = -INFINITY, top = -INFINITY, logit;
    i64 place = own.from;
    for (i64 i = 0; i < c->of; i++) {
      const float other = c->t->lowest[i * SCREENED + r];
      least = other > least ? other : least;
    }
    for (i64 o = own.from; o < own.to; o += 16) {
      const __mmask16 m = own.to - o < 16 ? (1u << (own.to - o)) - 1 : 0xffff;
      const __m512 high = _mm512_maskz_loadu_ps(m, s->highest + r * V + o);
      // Not below: a bound that is no number excludes nothing.
      __mmask16 open = _mm512_mask_cmp_ps_mask(m, high, ALL(least), _CMP_NLT_UQ);
      for (; open; open &= open - 1, tried++) {
        const i64 i = o + __builtin_ctz(open);
        const Part part = {at(0, s->head.weight, i * C), s->head.bias ? at(0, s->head.bias, i) : 0,
                           &logit, 1};
        few(0, &part, at(0, s->y, r * C), 0, 1, C, 0, 1);
        logit = _mm512_cvtss_f32(logits_at(0, s, &logit, 0, i, 1));
        if (top == top && !(logit <= top)) top = logit, place = i;
      }
    }
    c->t->own_peaks[c->me * R + r] = top;
    c->t->own_best[c->me * R + r] = (int32_t)place;
  }
  c->t->tried[c->me] = tried;
}

static void agree(const Step *t, i64 of) {
  for (i64 r = 0; r < t->rows; r++) {
    i64 found = r;
    for (i64 i = r + t->rows; i < of * t->rows; i += t->rows) {
      const float top = t->own_peaks[found], other = t->own_peaks[i];
      if (top == top && !(other <= top)) found = i;
    }
    t->peaks[r] = t->own_peaks[found];
    t->best[r] = t->own_best[found];
  }
}

#define BARRIER _Pragma("omp barrier")

FLAT void run(int half, const Stack *s, const Step *t, i64 me, i64 of) {
  const Crew crew = {s, t, me, of}, *c = &crew;
  const i64 C = s->hidden, wide = s->heads * s->size, far = larger(s->room, s->texts_room) + 15;
  const i64 widest = larger(larger(C, wide), s->width);
  const void *seen = s->before ? s->y : s->x;
  float *scores = s->scores + me * far;
  if (me == 0)
    for (i64 r = 0; r < t->rows; r++) t->from[r * s->room + t->position] = (int32_t)(t->first + r);
  embed(half, c);
  for (const Layer *l = s->layers; l < s->layers + s->count; l++) {
    if (s->before) norm(half, c, &l->norms[0], s->x, s->y);
    BARRIER
    const bf16 *packed = packed_of(half, c, seen, C, widest);
    linear(half, c, &l->q, low_of(l, Q), seen, packed, C, s->q, wide);
    linear(half, c, &l->k, low_of(l, K_), seen, packed, C, s->k, wide);
    linear(half, c, &l->v, low_of(l, V_), seen, packed, C, s->v, wide);
    BARRIER
    look(half, c, l, scores);
    BARRIER
    add(half, c, &l->out, low_of(l, OUT), s->inner, wide, widest);
    BARRIER
    norm(half, c, &l->norms[s->before], s->x, s->before ? s->y : s->x);
    BARRIER
    packed = packed_of(half, c, seen, C, widest);
    linear(half, c, &l->query, low_of(l, QUERY), seen, packed, C, s->q, wide);
    BARRIER
    cross(half, c, l, scores);
    BARRIER
    add(half, c, &l->cross_out, low_of(l, CROSS_OUT), s->inner, wide, widest);
    BARRIER
    norm(half, c, &l->norms[1 + s->before], s->x, s->before ? s->y : s->x);
    BARRIER
    widen_feed(half, c, l, seen, widest);
    BARRIER
    add(half, c, &l->down, low_of(l, DOWN), s->inner, s->width, widest);
    BARRIER
    if (!s->before) norm(half, c, &l->norms[2], s->x, s->x);
  }
  for (i64 r = me; r < t->rows; r += of) {
    void *y = at(half, s->y, r * C);
    memcpy(y, at(half, s->x, r * C), C * (half ? 2 : 4));
    if (s->last.weight) norm_row(half, s, &s->last, y, y);
    for (i64 i = 0; s->head_scale != 1 && i < C; i += 16)
      store(half, y, i, _mm512_mul_ps(load(half, y, i), ALL(s->head_scale)));
  }
  BARRIER
  if (!half && s->codes && !t->logits && t->rows <= SCREENED && bound_all(c)) {
    BARRIER
    try(c);
  } else {
    t->tried[me] = 0;
    finish(half, c, widest);
  }
  BARRIER
  if (me == 0) agree(t, of);
}

static __attribute__((noinline)) void run_wide(const Stack *s, const Step *t, i64 me, i64 of) {
  run(0, s, t, me, of);
}
static __attribute__((noinline)) void run_half(const Stack *s, const Step *t, i64 me, i64 of) {
  run(1, s, t, me, of);
}

void topwork_crossed(const Stack *s, const Step *t) {
#pragma omp parallel num_threads((int)t->threads)
    (s->half ? run_half : run_wide)(s, t, omp_get_thread_num(), omp_get_num_threads());
}
#endif
