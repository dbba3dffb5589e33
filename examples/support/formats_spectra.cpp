// Loops over spectra of 1 bit and values of three levels, for every instruction set.
#include "codecs.hpp"

namespace kvpare::cpu {
KVPARE_EXAMPLE_CODECS_SPECTRA(KVPARE_EXAMPLE_KEYS, KVPARE_EXAMPLE_VALUES)
}  // namespace kvpare::cpu
