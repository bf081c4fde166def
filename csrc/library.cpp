// The library's name and what it was built with. Operators are declared in each room's binding.cpp.
#include "mr1/torch_glue.h"

STABLE_TORCH_LIBRARY(megatron_r1, m) { (void)m; }

#ifndef MR1_BUILD_INFO
#define MR1_BUILD_INFO "unknown"
#endif

// key=value pairs separated by ';': cuda (architectures or "none"), compiler, sources (hash).
extern "C" __attribute__((visibility("default"))) const char* mr1_build_info() { return MR1_BUILD_INFO; }
