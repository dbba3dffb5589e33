// expect: commit writes: it needs EnginePages<half>, not EnginePages<const half>
#include <kvpare/backend/cpu/backend.hpp>
#include <kvpare/pipeline/engine.hpp>

void mistake(kvpare::EngineSequence<kvpare::cpu::Backend>& sequence, const kvpare::Plan& plan,
             std::span<const kvpare::EngineLayer<const kvpare::half>> layers) {
  sequence.commit(plan, layers);
}
