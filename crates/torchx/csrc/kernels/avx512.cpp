#define TORCHX_ISA avx512
#define TORCHX_TABLE kernels_avx512
#include "table.h"
