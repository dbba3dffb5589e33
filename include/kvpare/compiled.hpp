// What a program of many files may compile once: the cache on the CPU, and the methods that can be had by name.
//
// Header-only is the rule: without a macro all is compiled where it is used. With KVPARE_COMPILED_LOOPS = 0 in all files of a
// program nothing of this is, nor are the loops of backend/cpu/fused/sets.hpp: one file that defines it as 7 and includes
// this header holds what is declared here. cmake/loops.cmake makes a library of that file and those of the loops.
#pragma once

#include "backend/cpu/backend.hpp"
#include "pipeline/kv_cache.hpp"
#include "runtime/make_compressor.hpp"
#include "runtime/snapshot.hpp"

/// What depends on the backend, for any: `extern template` where it is declared, `template` in the one file that compiles it.
/// Used in namespace kvpare.
#define KVPARE_COMPILED_CACHE(how, B)                                                                                    \
  how class BasicKvCache<B>;                                                                                             \
  how void BasicKvCache<B>::observe(SequenceId, Index, const AnyCompressor&, ConstTensor, std::span<const Position>,     \
                                    bool, const float*);                                                                 \
  how Plan BasicKvCache<B>::plan(SequenceId, const AnyCompressor&) const;                                                \
  how LayerScores BasicKvCache<B>::scores(SequenceId, Index, const AnyCompressor&) const;                                \
  how EvictReport BasicKvCache<B>::decode(Index, std::span<const AttendRequest>, const AnyCompressor&);                  \
  how void detail::plan_layers(B&, const detail::PlanMethod<B>&, std::span<const TokenGroup>,                            \
                               std::span<const ScoredLayer>, PlanScope, Plan&);                                          \
  how void B::attention_mass(const MassArguments<PlainLogit, Probability>&);                                             \
  how void save(std::ostream&, const BasicKvCache<B>&, SequenceId);                                                      \
  how std::optional<SequenceId> load(std::istream&, BasicKvCache<B>&);

#if defined(KVPARE_COMPILED_LOOPS)
namespace kvpare {
#if KVPARE_COMPILED_LOOPS == 7
KVPARE_COMPILED_CACHE(template, cpu::Backend)
template void check(const AnyCompressor&);
#else
KVPARE_COMPILED_CACHE(extern template, cpu::Backend)
extern template void check(const AnyCompressor&);
#endif
}  // namespace kvpare
#endif
