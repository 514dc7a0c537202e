// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; 2011), eight blocks at a time.
#pragma once

#include "simd.h"

namespace torchx {
namespace TORCHX_ISA {

struct U64 {
  NativeU64 v[kParts];
};
constexpr Iota<uint64_t, 8, 0, 8> kBlockNumbers;

// The low halves' product; high halves are ignored.
TORCHX_INLINE NativeU64 multiply_low_halves(NativeU64 a, NativeU64 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<NativeU64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<NativeU64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<NativeU64>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// 64 numbers of 16 bits for one group of 64 columns.
//
// Block b of the group (counter word 0 is 8 * group + b) has words w0..w3. Lane 2b + i of quarter 0 is the low half of wi
// and of quarter 1 its high half, i in {0, 1}; quarters 2 and 3 are the same of w2 and w3.
struct Group {
  Mask words[2];

  TORCHX_INLINE Group draw(uint64_t site, uint64_t row, uint32_t line, int64_t group) {
    constexpr int kBlocks = kWidth / 2;
    U64 c0, c1, c2, c3;
    TORCHX_EACH {
      __builtin_memcpy(&c0.v[i], kBlockNumbers.lanes + i * kBlocks, sizeof c0.v[i]);
      c0.v[i] += static_cast<uint64_t>(group) * 8;
      c1.v[i] = NativeU64{} + line;
      c2.v[i] = NativeU64{} + row;
      c3.v[i] = NativeU64{} + (row >> 32);
    }
    uint32_t k0 = static_cast<uint32_t>(site), k1 = static_cast<uint32_t>(site >> 32);
    const NativeU64 m0 = NativeU64{} + 0xD2511F53u, m1 = NativeU64{} + 0xCD9E8D57u;
    // Words live in the low halves; what the high halves hold does not matter before the end.
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      TORCHX_EACH {
        const NativeU64 p0 = multiply_low_halves(c0.v[i], m0);
        const NativeU64 p1 = multiply_low_halves(c2.v[i], m1);
        c0.v[i] = (p1 >> 32) ^ c1.v[i] ^ (NativeU64{} + k0);
        c1.v[i] = p1;
        c2.v[i] = (p0 >> 32) ^ c3.v[i] ^ (NativeU64{} + k1);
        c3.v[i] = p0;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    Group g;
    TORCHX_EACH {
      const NativeU64 low = NativeU64{} + 0xffffffffu;
      g.words[0].v[i] = reinterpret_cast<NativeI>((c0.v[i] & low) | (c1.v[i] << 32));
      g.words[1].v[i] = reinterpret_cast<NativeI>((c2.v[i] & low) | (c3.v[i] << 32));
    }
    return g;
  }

  // Which lanes of a quarter are kept.
  TORCHX_INLINE Mask kept(const Group& g, int quarter, uint32_t threshold) {
    Mask r;
    TORCHX_EACH {
      const NativeU word = reinterpret_cast<NativeU>(g.words[quarter / 2].v[i]);
      const NativeU half = quarter % 2 ? word >> 16 : word & 0xffffu;
      r.v[i] = reinterpret_cast<NativeI>(half) > static_cast<int32_t>(threshold) - 1;
    }
    return r;
  }
};

// The factors (0 or mask.scale) of one line, padded(columns) floats.
TORCHX_INLINE void draw_factors(const DropoutMask& mask, int64_t sample, uint32_t line, int64_t columns, float* factors) {
  const uint64_t row = static_cast<uint64_t>(mask.rows[sample]);
  const F scale = splat(mask.scale), zero = splat(0.0f);
  for (int64_t group = 0; group * kGroup < columns; ++group) {
    const Group random = Group::draw(mask.site, row, line, group);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q)
      store(factors + group * kGroup + q * kLanes, select(Group::kept(random, q, mask.threshold), scale, zero));
  }
}

}  // namespace TORCHX_ISA
}  // namespace torchx
