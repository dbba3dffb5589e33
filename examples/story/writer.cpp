#include "writer.hpp"

#include <cmath>

namespace story {

int choose(const Eigen::Ref<const Row>& logits, const Sampling& sampling, Position position) {
  Index best = 0;
  const double largest = logits.maxCoeff(&best);
  if (sampling.temperature <= 0) return static_cast<int>(best);
  const Eigen::RowVectorXd weights = ((logits.cast<double>().array() - largest) / sampling.temperature).exp();
  double left = kvpare::random_unit(sampling.seed, position) * weights.sum();
  for (Index token = 0; token < weights.size(); ++token) {
    left -= weights[token];
    if (left < 0) return static_cast<int>(token);
  }
  return static_cast<int>(best);  // rounding only
}

Index write(const Decoder& decoder, Context& context, Draft& draft, Index steps,
            const std::function<void(int previous, int token)>& visit, const Attention& watch) {
  kvpare::require(draft.finished || std::ssize(draft.tokens) > context.length(), "write: nothing to go on from: all ",
                  draft.tokens.size(), " tokens have been read");
  Index written = 0;
  while (written < steps && !draft.finished && std::ssize(draft.tokens) <= decoder.shape().longest) {
    const Matrix hidden =
        context.read(std::span(draft.tokens).subspan(static_cast<std::size_t>(context.length())), watch);
    const int next = choose(decoder.logits(hidden.bottomRows(1)).row(0), draft.sampling, context.length());
    if (next == begin_of_text || next == end_of_text) {
      draft.finished = true;
      break;
    }
    if (visit) visit(draft.tokens.back(), next);
    draft.tokens.push_back(next);
    ++written;
  }
  return written;
}

}  // namespace story
