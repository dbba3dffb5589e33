// A cache on the device that the user names, and what is done with the model there.
#pragma once

#include <memory>
#include <ostream>
#include <vector>

#include "decoder.hpp"
#include "evaluation_set.hpp"
#include "result.hpp"
#include "support/states.hpp"

namespace vlm {

/// Where the cache is, policies work and attention runs.
enum class Device { cpu, cuda };

/// For one thread at a time.
class Engine {
 public:
  virtual ~Engine() = default;

  /// What codecs have learnt of the model, for dialogues from now on.
  virtual void share_states(const example::States& states) = 0;

  /// The dialogues about one scene that these tasks need. Throws what the library throws.
  virtual Result converse(const Decoder& decoder, const Scene& scene, const kvpare::AnyCompressor& compressor,
                          const std::vector<Task>& tasks, const Visit& visit = {}) = 0;

  /// Which patches are left of the picture after a prompt: [layer][kv head], ascending.
  virtual std::vector<std::vector<std::vector<Index>>> kept_patches(const Decoder& decoder, const Scene& scene,
                                                                    const Turn& asked,
                                                                    const kvpare::AnyCompressor& compressor) = 0;

  /// Shows what attention is given for an embedded prompt.
  virtual void watch(const Decoder& decoder, Matrix prompt, const Decoder::Watch& watch) = 0;

  virtual void print_formats(std::ostream& out) const = 0;
};

/// Pages for the dialogues about one scene, of which three are alive at once.
kvpare::CacheOptions cache_options(Index page_tokens);

/// Throws std::runtime_error where this build or this machine has no such device.
void check_device(Device device);

/// `threads` are the CPU backend's own. Throws as `check_device` does, and what the library throws.
std::unique_ptr<Engine> make_engine(Device device, Index page_tokens, Index threads = 1);

}  // namespace vlm
