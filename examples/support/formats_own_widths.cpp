// Loops over widths of their own, for every instruction set.
#include "codecs.hpp"

namespace kvpare::cpu {
KVPARE_EXAMPLE_CODECS_OWN_WIDTHS(KVPARE_EXAMPLE_KEYS, KVPARE_EXAMPLE_VALUES)
}  // namespace kvpare::cpu
