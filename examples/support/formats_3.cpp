// Loops over codes of 3 bits, for every instruction set.
#include "codecs.hpp"

namespace kvpare::cpu {
KVPARE_EXAMPLE_CODECS_3(KVPARE_EXAMPLE_KEYS, KVPARE_EXAMPLE_VALUES)
}  // namespace kvpare::cpu
