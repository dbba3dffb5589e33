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

#if defined(KVPARE_COMPILED_LOOPS)
namespace kvpare {

#if KVPARE_COMPILED_LOOPS == 7
#define KVPARE_COMPILED template
#else
#define KVPARE_COMPILED extern template
#endif

KVPARE_COMPILED class BasicKvCache<cpu::Backend>;
KVPARE_COMPILED void check(const AnyCompressor&);
KVPARE_COMPILED void BasicKvCache<cpu::Backend>::observe(SequenceId, Index, const AnyCompressor&, ConstTensor,
                                                         std::span<const Position>, bool, const float*);
KVPARE_COMPILED Plan BasicKvCache<cpu::Backend>::plan(SequenceId, const AnyCompressor&) const;
KVPARE_COMPILED LayerScores BasicKvCache<cpu::Backend>::scores(SequenceId, Index, const AnyCompressor&) const;
KVPARE_COMPILED EvictReport BasicKvCache<cpu::Backend>::decode(Index, std::span<const AttendRequest>,
                                                               const AnyCompressor&);
KVPARE_COMPILED void save(std::ostream&, const BasicKvCache<cpu::Backend>&, SequenceId);
KVPARE_COMPILED std::optional<SequenceId> load(std::istream&, BasicKvCache<cpu::Backend>&);

#undef KVPARE_COMPILED
}  // namespace kvpare
#endif
