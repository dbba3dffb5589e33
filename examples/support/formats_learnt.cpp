// Loops over dictionaries and learned codebooks, for every instruction set.
#include "codecs.hpp"

namespace kvpare::cpu {
KVPARE_EXAMPLE_CODECS_LEARNT(KVPARE_EXAMPLE_KEYS, KVPARE_EXAMPLE_VALUES)
}  // namespace kvpare::cpu
