// Included by one source file per instruction set, with TORCHX_ISA and TORCHX_TABLE defined.
#include "dropout.h"
#include "layer_norm.h"
#include "softmax.h"

#define TORCHX_TEXT_(x) #x
#define TORCHX_TEXT(x) TORCHX_TEXT_(x)

namespace torchx {

const Kernels TORCHX_TABLE = {
    TORCHX_TEXT(TORCHX_ISA),
    {TORCHX_ISA::dropout<float>, TORCHX_ISA::dropout<Bf16>},
    {{TORCHX_ISA::layer_norm<float, float>, TORCHX_ISA::layer_norm<float, Bf16>},
     {TORCHX_ISA::layer_norm<Bf16, float>, TORCHX_ISA::layer_norm<Bf16, Bf16>}},
    {{TORCHX_ISA::layer_norm_backward<float, float>, TORCHX_ISA::layer_norm_backward<float, Bf16>},
     {TORCHX_ISA::layer_norm_backward<Bf16, float>, TORCHX_ISA::layer_norm_backward<Bf16, Bf16>}},
    {TORCHX_ISA::softmax<float>, TORCHX_ISA::softmax<Bf16>},
    {TORCHX_ISA::softmax_backward<float>, TORCHX_ISA::softmax_backward<Bf16>},
};

}  // namespace torchx
