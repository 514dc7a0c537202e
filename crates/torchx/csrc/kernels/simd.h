// Sixteen lanes of fp32, as 1, 2 or 4 native vectors.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define TORCHX_INLINE static inline __attribute__((always_inline))

namespace torchx {
namespace TORCHX_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;

typedef float NativeF __attribute__((vector_size(4 * kWidth)));
typedef int32_t NativeI __attribute__((vector_size(4 * kWidth)));
typedef uint32_t NativeU __attribute__((vector_size(4 * kWidth)));
typedef uint64_t NativeU64 __attribute__((vector_size(4 * kWidth)));
typedef uint16_t NativeU16 __attribute__((vector_size(2 * kWidth)));
typedef uint8_t NativeU8 __attribute__((vector_size(kWidth)));
typedef NativeF UnalignedF __attribute__((aligned(4), may_alias));
typedef NativeU16 UnalignedU16 __attribute__((aligned(2), may_alias));

struct F {
  NativeF v[kParts];
};
struct Mask {
  NativeI v[kParts];
};

#define TORCHX_EACH for (int i = 0; i < kParts; ++i)

TORCHX_INLINE F splat(float s) {
  F r;
  TORCHX_EACH r.v[i] = NativeF{} + s;
  return r;
}
TORCHX_INLINE F operator+(F a, F b) {
  TORCHX_EACH a.v[i] += b.v[i];
  return a;
}
TORCHX_INLINE F operator-(F a, F b) {
  TORCHX_EACH a.v[i] -= b.v[i];
  return a;
}
TORCHX_INLINE F operator*(F a, F b) {
  TORCHX_EACH a.v[i] *= b.v[i];
  return a;
}
TORCHX_INLINE Mask operator<(F a, F b) {
  Mask r;
  TORCHX_EACH r.v[i] = a.v[i] < b.v[i];
  return r;
}
TORCHX_INLINE F select(Mask m, F a, F b) {
  TORCHX_EACH a.v[i] = m.v[i] ? a.v[i] : b.v[i];
  return a;
}
TORCHX_INLINE F max(F a, F b) { return select(a < b, b, a); }

// first, first + 1, ... modulo `wrap`, as a constant in memory: built lane by lane it costs more than what it is used for.
template <class Lane, int kCount, int kFirst, int kWrap>
struct Iota {
  alignas(64) Lane lanes[kCount];

  constexpr Iota() : lanes{} {
    for (int i = 0; i < kCount; ++i) lanes[i] = static_cast<Lane>((kFirst + i) % kWrap);
  }
};
constexpr Iota<int32_t, kLanes, 0, kLanes> kLaneNumbers;

// Lanes below `count`.
TORCHX_INLINE Mask first_lanes(int64_t count) {
  Mask r;
  TORCHX_EACH {
    NativeI lane;
    __builtin_memcpy(&lane, kLaneNumbers.lanes + i * kWidth, sizeof lane);
    r.v[i] = lane < static_cast<int32_t>(count);
  }
  return r;
}

// Lane i becomes op(lane i, lane i + distance), then the same for half the distance, down to 1.
template <int kDistance, class Op>
TORCHX_INLINE NativeF fold(NativeF v, Op op) {
  if constexpr (kDistance > 0) {
    static constexpr Iota<int32_t, kWidth, kDistance, kWidth> order;
    NativeI rotated;
    __builtin_memcpy(&rotated, order.lanes, sizeof rotated);
    return fold<kDistance / 2>(op(v, __builtin_shuffle(v, rotated)), op);
  }
  return v;
}

// Lanes 8 apart, then 4, 2, 1: the same tree for every width.
template <class Op>
TORCHX_INLINE float reduce(F a, Op op) {
  for (int half = kParts / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = op(a.v[i], a.v[i + half]);
  return fold<kWidth / 2>(a.v[0], op)[0];
}
TORCHX_INLINE float sum(F a) {
  return reduce(a, [](NativeF x, NativeF y) __attribute__((always_inline)) { return x + y; });
}
TORCHX_INLINE float largest(F a) {
  return reduce(a, [](NativeF x, NativeF y) __attribute__((always_inline)) { return x < y ? y : x; });
}

TORCHX_INLINE F load(const float* p) {
  F r;
  TORCHX_EACH r.v[i] = *reinterpret_cast<const UnalignedF*>(p + i * kWidth);
  return r;
}
TORCHX_INLINE void store(float* p, F a) {
  TORCHX_EACH *reinterpret_cast<UnalignedF*>(p + i * kWidth) = a.v[i];
}
TORCHX_INLINE F load(const Bf16* p) {
  F r;
  TORCHX_EACH {
    const NativeU16 bits = *reinterpret_cast<const UnalignedU16*>(p + i * kWidth);
    r.v[i] = reinterpret_cast<NativeF>(__builtin_convertvector(bits, NativeU) << 16);
  }
  return r;
}
// Rounds to the nearest, ties to even; NaN stays NaN.
TORCHX_INLINE void store(Bf16* p, F a) {
  TORCHX_EACH {
    const NativeU bits = reinterpret_cast<NativeU>(a.v[i]);
    const NativeU rounded = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;
    const NativeU value = a.v[i] == a.v[i] ? rounded : NativeU{} + 0x7fc0u;
    *reinterpret_cast<UnalignedU16*>(p + i * kWidth) = __builtin_convertvector(value, NativeU16);
  }
}

// The first `count` < 16 lanes; the others are zero, and nothing is touched beyond them.
template <class T>
TORCHX_INLINE F load_first(const T* p, int64_t count) {
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
TORCHX_INLINE void store_first(T* p, int64_t count, F a) {
  T buffer[kLanes];
  store(buffer, a);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}
#if defined(__AVX512F__)
TORCHX_INLINE F load_first(const float* p, int64_t count) {
  F r;
  r.v[0] = reinterpret_cast<NativeF>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
  return r;
}
TORCHX_INLINE void store_first(float* p, int64_t count, F a) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(a.v[0]));
}
TORCHX_INLINE F load_first(const Bf16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p);
  F r;
  r.v[0] = reinterpret_cast<NativeF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  return r;
}
TORCHX_INLINE void store_first(Bf16* p, int64_t count, F a) {
  Bf16 buffer[kLanes];
  store(buffer, a);
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer));
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1), bits);
}
#elif defined(__AVX2__)
TORCHX_INLINE F load_first(const float* p, int64_t count) {
  const Mask m = first_lanes(count);
  F r;
  TORCHX_EACH r.v[i] = reinterpret_cast<NativeF>(_mm256_maskload_ps(p + i * kWidth, reinterpret_cast<__m256i>(m.v[i])));
  return r;
}
TORCHX_INLINE void store_first(float* p, int64_t count, F a) {
  const Mask m = first_lanes(count);
  TORCHX_EACH _mm256_maskstore_ps(p + i * kWidth, reinterpret_cast<__m256i>(m.v[i]), reinterpret_cast<__m256>(a.v[i]));
}
#endif

// exp for arguments up to 88, relative error below 2e-7, zero below -87: reduction by multiples of ln 2 to
// [-0.35, 0.35], Taylor series, and the power of two added into the exponent.
TORCHX_INLINE F exp(F x) {
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Mask tiny = x < splat(-87.0f);
  x = max(x, splat(-87.0f));
  const F n = (x * splat(1.44269504f) + magic) - magic;
  const F r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  F p = splat(1.0f / 5040);
  p = p * r + splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = (p * r) * r + r + splat(1.0f);
  TORCHX_EACH {
    const NativeI power = __builtin_convertvector(n.v[i], NativeI) << 23;
    p.v[i] = reinterpret_cast<NativeF>(reinterpret_cast<NativeI>(p.v[i]) + power);
  }
  return select(tiny, splat(0.0f), p);
}

}  // namespace TORCHX_ISA
}  // namespace torchx
