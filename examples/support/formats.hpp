// The page formats of the example programs, for caches on the CPU.
#pragma once

#include <kvpare/kvpare.hpp>

#include "codecs.hpp"
#include "format_list.hpp"
