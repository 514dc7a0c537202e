#define TORCHX_ISA avx2
#define TORCHX_TABLE kernels_avx2
#include "table.h"
