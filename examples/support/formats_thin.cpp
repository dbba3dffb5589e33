// Loops over keys of fewer channels, for every instruction set.
#include "codecs.hpp"

namespace kvpare::cpu {
KVPARE_EXAMPLE_CODECS_THIN(KVPARE_EXAMPLE_KEYS, KVPARE_EXAMPLE_VALUES)
}  // namespace kvpare::cpu
