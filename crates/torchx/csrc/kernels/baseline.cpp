#define TORCHX_ISA baseline
#define TORCHX_TABLE kernels_baseline
#include "table.h"
