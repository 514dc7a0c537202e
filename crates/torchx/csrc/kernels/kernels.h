// The fused CPU kernels, as a table of functions per instruction set.
//
// Kernels see raw pointers and a range of lines. They are compiled once per instruction set into a namespace of its own,
// include nothing of libtorch or the standard library (an inline function compiled for AVX-512 could be linked into code
// for every machine), and give the same bits whatever the set: 16 lanes are summed in one fixed order, products and sums
// are never contracted.
#pragma once

#include <stdint.h>

namespace torchx {

enum Dtype { F32 = 0, BF16 = 1 };

struct Bf16 {
  uint16_t bits;
};

// Which elements are kept: element (line l, column d) of sample r is, where its 16 bits of Philox4x32-10 with counter
// (d's block, l, rows[r]) and key `site` are at least `threshold`. Zero keeps everything and draws nothing.
struct DropoutMask {
  const int64_t* rows;
  uint64_t site;
  uint32_t threshold;
  float scale;
};

// x, y: [samples, lines, columns].
struct DropoutArgs {
  const void* x;
  void* y;
  int64_t lines;
  int64_t columns;
  DropoutMask mask;
};

// y = LN(dropout(x) + residual); x, residual, y: [samples, lines, columns], y of the dtype of residual; mean, rstd: [samples * lines].
struct LayerNormArgs {
  const void* x;
  const void* residual;
  const float* weight;
  const float* bias;
  void* y;
  float* mean;
  float* rstd;
  int64_t lines;
  int64_t columns;
  float eps;
  DropoutMask mask;
};

// The range of a call is added into grad_weight and grad_bias.
struct LayerNormBackwardArgs {
  const void* grad_y;
  const void* x;
  const void* residual;
  const float* weight;
  const float* mean;
  const float* rstd;
  void* grad_x;
  void* grad_residual;
  int64_t lines;
  int64_t columns;
  DropoutMask mask;
};

// scores: [samples, heads, queries, keys], replaced by softmax(scale * scores); dropped: the same after dropout.
// Line (h, q) of a sample has the number h * 2^16 + q, whatever the number of queries.
struct SoftmaxArgs {
  void* scores;
  void* dropped;
  const uint8_t* allowed;  // null, or 1 where a query may attend
  int64_t allowed_stride_sample, allowed_stride_head, allowed_stride_query;
  int64_t heads;
  int64_t queries;
  int64_t keys;
  float scale;
  DropoutMask mask;
};

// grad_dropped is replaced by the gradient of the scores.
struct SoftmaxBackwardArgs {
  const void* probabilities;
  const void* dropped;
  void* grad_dropped;
  int64_t keys;
  float scale;
};

// A range counts groups of 64 columns for dropout and lines for the others. Tables are indexed by Dtype, of x before
// that of residual; `scratch` has 3 * padded(columns) floats.
struct Kernels {
  const char* isa;
  void (*dropout[2])(const DropoutArgs&, int64_t begin, int64_t end);
  void (*layer_norm[2][2])(const LayerNormArgs&, float* scratch, int64_t begin, int64_t end);
  void (*layer_norm_backward[2][2])(
      const LayerNormBackwardArgs&, float* grad_weight, float* grad_bias, float* scratch, int64_t begin, int64_t end);
  void (*softmax[2])(const SoftmaxArgs&, float* scratch, int64_t begin, int64_t end);
  void (*softmax_backward[2])(const SoftmaxBackwardArgs&, int64_t begin, int64_t end);
};

constexpr int64_t kGroup = 64;

inline int64_t padded(int64_t columns) { return (columns + kGroup - 1) / kGroup * kGroup; }

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The best that this machine runs, or what torchx_isa_set chose.
const Kernels& kernels();

}  // namespace torchx
