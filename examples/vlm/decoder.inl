// Decoder::forward, for the files that compile it for a backend.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "decoder.hpp"
#include "support/taken_in_turns.hpp"

namespace vlm {

/// Attention of all rows over what the cache still holds of their sequence.
template <kvpare::Backend B, class F>
void attend(Cache<B, F>& cache, Index layer, kvpare::SequenceId sequence, const kvpare::ConstTensor& queries,
            std::span<const Position> positions, const kvpare::Tensor& out) {
  constexpr Index rows_per_attend = 64;  // the most that one call takes
  for (Index begin = 0; begin < queries.rows; begin += rows_per_attend) {
    const Index rows = std::min(rows_per_attend, queries.rows - begin);
    const kvpare::AttendRequest request{
        .sequence = sequence,
        .queries = queries.part(begin, rows),
        .positions = positions.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(rows)),
        .out = out.part(begin, rows),
    };
    cache.attend(layer, std::span(&request, 1));
  }
}

template <kvpare::Backend B, class F>
Row Decoder::forward(Cache<B, F>& cache, kvpare::SequenceId sequence, Matrix x, Position first, const Watch& watch,
                     HiddenStates* states) const {
  const Index tokens = x.rows();
  Pass pass(*this, std::move(x), first);
  const auto turns = [&](Matrix& rows) {
    return example::TakenInTurns<B>(cache.backend(), {rows.data(), static_cast<std::size_t>(rows.size())});
  };
  auto queries = turns(pass.queries), keys = turns(pass.keys), values = turns(pass.values), out = turns(pass.attended);
  const auto heads = [&](float* rows, Index count) { return kvpare::Tensor(rows, tokens, count, head_dim); };

  for (Index l = 0; l < layer_count; ++l) {
    const bool wanted = states != nullptr && states->layer == l;
    if (wanted) states->entering = pass.residual();
    pass.begin(l);
    queries.to_backend(), keys.to_backend(), values.to_backend();
    const kvpare::Tensor backend_queries = heads(queries.on_backend(), q_heads);
    if (cache.append(sequence, l, heads(keys.on_backend(), kv_heads), heads(values.on_backend(), kv_heads),
                     pass.positions) != kvpare::Outcome::done)
      throw std::runtime_error("the cache is full: give it more pool_bytes");
    if (watch)
      watch(l, {heads(pass.queries.data(), q_heads), heads(pass.keys.data(), kv_heads),
                heads(pass.values.data(), kv_heads), backend_queries, pass.positions});
    attend(cache, l, sequence, backend_queries, pass.positions, heads(out.on_backend(), q_heads));
    out.to_host();
    pass.finish(l);
    if (wanted) states->mlp_input = pass.mlp_input;
  }
  return pass.logits();
}

}  // namespace vlm
