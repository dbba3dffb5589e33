// Which tokens share a budget: all that the selector chooses among, or those of one class or image.
#pragma once

#include <algorithm>
#include <vector>

#include "../cache/tags.hpp"
#include "../policy/select/top_k.hpp"

namespace kvpare {

/// Tokens with a budget of their own, wherever layers hold them. Groups have no position in common.
struct TokenGroup {
  PositionSpans at;
  Keep keep;
};

/// The groups of a sequence: first those that the selector's `keep` is for, then those of `also`.
inline std::vector<TokenGroup> groups_of(const TopK& selector, const Keep& keep, const Tags& tags) {
  std::vector<TokenGroup> groups;
  const auto add = [&](PositionSpans at, const Keep& amount) {
    if (!at.empty()) groups.push_back({std::move(at), amount});
  };
  switch (selector.each) {
    case Each::none:
      groups.push_back({tags.of_class(selector.among), keep});
      break;
    case Each::token_class:
      for (int c = 0; c < token_classes; ++c)
        if (selector.among.has(static_cast<TokenClass>(c))) add(tags.of_class(static_cast<TokenClass>(c)), keep);
      break;
    case Each::image: {
      const auto same = [](const TagSpan& a, const TagSpan& b) {
        return a.token_class == b.token_class && a.image == b.image && a.image >= 0;
      };
      const std::vector<TagSpan>& spans = tags.spans();
      for (auto span = spans.begin(); span != spans.end(); ++span) {
        if (!selector.among.has(span->token_class) ||
            std::any_of(spans.begin(), span, [&](const TagSpan& earlier) { return same(earlier, *span); }))
          continue;
        add(tags.where([&](const TagSpan* s) { return s != nullptr && (s == &*span || same(*s, *span)); }), keep);
      }
      if (selector.among.has(TokenClass::text)) add(tags.where([](const TagSpan* s) { return s == nullptr; }), keep);
      break;
    }
  }
  for (const ClassKeep& part : selector.also) add(tags.of_class(part.classes), part.keep);
  return groups;
}

}  // namespace kvpare
