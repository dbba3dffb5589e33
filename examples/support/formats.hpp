// The page formats of the example programs, for caches on the CPU.
#pragma once

#include <kvpare/kvpare.hpp>

#include "codecs.hpp"
#include "format_list.hpp"

// In formats_lists.cpp.
extern template class kvpare::KvCache<kvpare::cpu::Backend, example::ModelFormats<float, 8>>;
extern template class kvpare::KvCache<kvpare::cpu::Backend, example::ModelFormats<float, 32>>;
extern template class kvpare::KvCache<kvpare::cpu::Backend, example::ModelFormats<kvpare::half, 32>>;
extern template class kvpare::KvCache<kvpare::cpu::Backend, example::ModelFormats<kvpare::bfloat16, 32>>;
