// Caches of all formats.
#include "formats.hpp"

template class kvpare::KvCache<kvpare::cpu::Backend, example::ModelFormats<float, 8>>;
template class kvpare::KvCache<kvpare::cpu::Backend, example::ModelFormats<float, 32>>;
template class kvpare::KvCache<kvpare::cpu::Backend, example::ModelFormats<kvpare::half, 32>>;
template class kvpare::KvCache<kvpare::cpu::Backend, example::ModelFormats<kvpare::bfloat16, 32>>;
