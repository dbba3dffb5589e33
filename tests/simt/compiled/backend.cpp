// The kernels, once for all tests of the CUDA backend on the host.
#include "../backend.hpp"

template class kvpare::cuda::BasicBackend<kvpare::test::simt::Runtime>;
template void kvpare::test::simt::Backend::attention_mass(const MassArguments<PlainLogit, Probability>&);
