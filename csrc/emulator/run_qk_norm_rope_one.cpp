// The same harness with one type (bf16) and one head size for the kernels of 16-byte accesses: instrumented builds of everything
// take minutes.
#define MR1_QKNR_ONE
#include "run_qk_norm_rope.cpp"
