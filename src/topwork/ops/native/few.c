// y = x wᵀ + b of a few rows x: each weight is read from memory once, ahead of its use.
//
// x [N, C], w [O, C], b [O] or null, y [N, O], all fp32 or all bf16 (whose sums are fp32). Several
// weights of one x go in one call. A row's sums are formed in one order, whatever rows are beside it;
// bf16 has two orders, in vector registers and, from TALL rows on, on AMX tiles.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)

#include <omp.h>

#include "few.h"

// `tiles`: the processor gives them; they take C in whole numbers of 32, O of 16, N up to 32.
void topwork_few(const Part *parts, i64 count, const char *x, i64 N, i64 C, i64 half, i64 tiles,
                 i64 threads) {
  bf16 *packed = 0;
  if (half && tiles && N >= TALL && C % 32 == 0) {
    packed = scratch(SHARED, 128 * C);
    pack(packed, (const bf16 *)x, N, C);
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const i64 of = omp_get_num_threads(), me = omp_get_thread_num();
    for (const Part *p = parts; p < parts + count; p++) {
      const i64 each = (p->out + of * 48 - 1) / (of * 48) * 48, o = each * me;
      const i64 stop = o + each < p->out ? o + each : p->out;
      if (half) few(1, p, x, packed, N, C, o, stop);
      else few(0, p, x, packed, N, C, o, stop);
    }
  }
}
#endif
