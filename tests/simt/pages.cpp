// The suite of conformance/pages.cpp on the CUDA backend's kernels, run on the host.
#define KVPARE_TEST_SIMT
#include "conformance/pages.cpp"
