// Weights of 4 bits in flat blocks: two codes to a byte, the earlier one in its high half, each a
// place among 16 levels, and a factor to a block.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

// The levels times the factor, rounded to bf16: all values that a block can have. The sum carries
// what is cut off into the last place, halves to even; what is no number stays none.
#ifdef __AVX512BW__
static inline __m512i values_of(__m512 levels, float factor) {
  __m512 y = _mm512_mul_ps(levels, _mm512_set1_ps(factor));
  __m512i bits = _mm512_castps_si512(y);
  __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, last), _mm512_set1_epi32(0x7fff));
  up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q),
                             _mm512_set1_epi32(0x7fc00000));
  return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
#else
static inline void values_of(uint16_t *to, const float *levels, float factor) {
  for (int i = 0; i < 16; i++) {
    float y = levels[i] * factor;
    uint32_t bits;
    memcpy(&bits, &y, 4);
    to[i] = y != y ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
#endif

// codes [n / 2], factors [n / block], levels [16], y [n] bf16; 32 divides block, and block n.
void topwork_blocks4_decode(const uint8_t *codes, const float *factors, const float *levels,
                            uint16_t *y, int64_t n, int64_t block) {
#ifdef __AVX512BW__
  const __m512 all = _mm512_loadu_ps(levels);
#endif
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < n / block; b++) {
    const uint8_t *from = codes + b * block / 2;
    uint16_t *to = y + b * block;
#ifdef __AVX512BW__
    const __m512i table = values_of(all, factors[b]);
    for (int64_t i = 0; i < block; i += 32) {
      // A lookup takes 5 bits of an index and the table stands there twice: what the low half
      // of a byte has above its 4 bits does no harm.
      __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(from + i / 2)));
      __m512i at = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
      _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(at, table));
    }
#else
    uint16_t values[16];
    values_of(values, levels, factors[b]);
    for (int64_t i = 0; i < block; i += 2) {
      to[i] = values[from[i / 2] >> 4];
      to[i + 1] = values[from[i / 2] & 15];
    }
#endif
  }
}

// The nearest level of x [n], as its place among the ascending levels: how many of the `edges`
// [15] between them are below x / factor. order [16] gives each place its code.
void topwork_blocks4_encode(const float *x, const float *edges, const uint8_t *order,
                            uint8_t *codes, float *factors, int64_t n, int64_t block) {
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < n / block; b++) {
    const float *from = x + b * block;
    uint8_t *to = codes + b * block / 2;
    float most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < block; i++) {
      float size = fabsf(from[i]);
      most = size > most ? size : most;
    }
    factors[b] = most;
    const float by = 1.0f / (most < 1e-38f ? 1e-38f : most);
    for (int64_t at = 0; at < block; at += 32) {
      int32_t place[32] = {0};
      for (int e = 0; e < 15; e++)
#pragma omp simd
        for (int i = 0; i < 32; i++) place[i] += from[at + i] * by > edges[e];
      for (int i = 0; i < 32; i += 2)
        to[(at + i) / 2] = (uint8_t)(order[place[i]] << 4 | order[place[i + 1]]);
    }
  }
}
