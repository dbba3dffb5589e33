// Writes a text on, token by token.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "context.hpp"

namespace story {

/// How the next token is chosen: the likeliest with temperature 0, else at random in proportion to
/// exp(logit / temperature). The chance depends on the seed and the position only, so it needs no state.
struct Sampling {
  double temperature = 0;
  std::uint64_t seed = 0;
  friend bool operator==(const Sampling&, const Sampling&) = default;
};

int choose(const Eigen::Ref<const Row>& logits, const Sampling& sampling, Position position);

/// A text on its way: all tokens so far, the last ones perhaps not read into the context yet.
struct Draft {
  std::vector<int> tokens;
  Sampling sampling = {};
  bool finished = false;  // the model has ended it
};

/// Adds up to `steps` tokens. Stops where the model ends the text (the token that says so is not added) or its longest
/// sequence is full. `visit` sees every new token. Gives how many there were.
Index write(const Decoder& decoder, Context& context, Draft& draft, Index steps,
            const std::function<void(int previous, int token)>& visit = {}, const Attention& watch = {});

}  // namespace story
