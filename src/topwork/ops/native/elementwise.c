// The passes of a block that only read and write memory, each as one pass over threads, for bf16
// and float. Plain loops that any compiler vectorises; sums are fp32 and do not depend on the
// number of threads.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float get_bf16(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// To nearest, ties to even. A NaN stays one: those of bf16 inputs and of the processor have low bits
// of zero, which no carry leaves.
static inline bf16 put_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float get_float(float x) { return x; }
static inline float put_float(float x) { return x; }

static inline float exponential(float x) {
  x *= 1.44269504f;
  x = x < -126.0f ? -126.0f : x;  // a comparison that lets NaN through
  x = x > 127.0f ? 127.0f : x;
  float whole = rintf(x), f = x - whole;
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  int32_t bits = ((int32_t)whole + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}

// 32 random bits from a counter and a key of two words, after murmur3's finaliser.
static inline uint32_t mix(uint32_t counter, uint32_t key0, uint32_t key1) {
  uint32_t h = counter * 0x9e3779b1u + key0;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = ((h ^ key1) ^ ((h ^ key1) >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

enum { BLOCK = 4096 /* elements of a task in flat passes */, SPLIT = 16 /* partial sums of a row */ };

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(what) JOIN(topwork_##what, T)
#define GET(x) JOIN(get, T)(x)
#define PUT(x) JOIN(put, T)(x)

#define T bf16
#include "elementwise.h"
#undef T
#define T float
#include "elementwise.h"
