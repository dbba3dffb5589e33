// The suite of conformance/attend.cpp on the CUDA backend's kernels, run on the host.
#define KVPARE_TEST_SIMT
#include "conformance/attend.cpp"
