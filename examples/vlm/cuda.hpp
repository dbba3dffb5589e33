// The engine on a GPU, where KVPARE_CUDA is on.
#pragma once

#include <memory>

#include "engine.hpp"

namespace vlm {

/// Throws std::runtime_error when there is no device.
void check_cuda();

/// On a stream of its own.
std::unique_ptr<Engine> make_cuda_engine(Index page_tokens);

}  // namespace vlm
