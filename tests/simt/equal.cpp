// The suite of conformance/equal.cpp on the CUDA backend's kernels, run on the host: the same plans as on the CPU.
#define KVPARE_TEST_SIMT
#include "conformance/equal.cpp"
