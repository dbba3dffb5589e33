// `attention_mass` on the device.
#pragma once

#include <stdexcept>

#include "rows.cuh"

namespace kvpare::cuda {

template <class Work, class Logit, class EntryOf>
void attention_mass(Work&, const MassArguments<Logit, EntryOf>&) {
  throw std::logic_error("attention_mass: not written yet");
}

}  // namespace kvpare::cuda
