// The suite of conformance/attention_mass.cpp on the CUDA backend's kernels, run on the host.
#define KVPARE_TEST_SIMT
#include "conformance/attention_mass.cpp"
