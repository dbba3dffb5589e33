// What kind of token stands where: spans of logical positions, stored once per sequence.
#pragma once

#include <algorithm>
#include <bit>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../core/config.hpp"
#include "../core/error.hpp"

namespace kvpare {

/// Kinds of token. Values from `user` up to 31 are the caller's own.
enum class TokenClass : std::uint8_t { text = 0, image = 1, video = 2, audio = 3, system = 4, user = 5 };
inline constexpr int token_classes = 32;

/// A set of token classes.
struct ClassSet {
  std::uint32_t bits = 0;

  constexpr ClassSet() = default;
  constexpr explicit ClassSet(std::uint32_t b) : bits(b) {}
  constexpr ClassSet(TokenClass c) : bits(std::uint32_t{1} << static_cast<int>(c)) {}
  constexpr bool has(TokenClass c) const { return bits >> static_cast<int>(c) & 1u; }
  friend constexpr ClassSet operator|(ClassSet a, ClassSet b) { return ClassSet(a.bits | b.bits); }
  friend constexpr bool operator==(ClassSet, ClassSet) = default;
};

inline constexpr ClassSet all_tokens{~std::uint32_t{0}};
inline constexpr ClassSet text = TokenClass::text;
inline constexpr ClassSet visual = ClassSet(TokenClass::image) | TokenClass::video;

inline constexpr std::pair<std::string_view, ClassSet> class_names[] = {
    {"all", all_tokens},           {"visual", visual},           {"text", TokenClass::text},
    {"image", TokenClass::image},  {"video", TokenClass::video}, {"audio", TokenClass::audio},
    {"system", TokenClass::system}};

/// Reads "visual" or "image+audio"; false when a word is unknown.
inline bool parse_setting(std::string_view words, ClassSet& out) {
  ClassSet set;
  while (true) {
    const auto plus = words.find('+');
    const auto word = words.substr(0, plus);
    const auto* known =
        std::find_if(std::begin(class_names), std::end(class_names), [&](auto& n) { return n.first == word; });
    if (known == std::end(class_names)) return false;
    set = set | known->second;
    if (plus == std::string_view::npos) break;
    words.remove_prefix(plus + 1);
  }
  out = set;
  return true;
}

inline std::string print_setting(ClassSet set) {
  for (const auto& [name, named] : class_names)
    if (named == set) return std::string(name);
  std::string joined;
  for (const auto& [name, named] : class_names)
    if (std::has_single_bit(named.bits) && (set.bits & named.bits)) {
      if (!joined.empty()) joined += '+';
      joined += name;
    }
  return joined;
}

/// Positions [begin, end) are of one class, perhaps of one image, perhaps never to be evicted.
struct TagSpan {
  Position begin = 0, end = 0;
  TokenClass token_class = TokenClass::text;
  Index image = -1;                    // which image or clip, -1 = none
  Index grid_rows = 0, grid_cols = 0;  // raster layout of an image's tokens, 0 = unknown
  bool is_protected = false;           // no policy may evict these
  friend bool operator==(const TagSpan&, const TagSpan&) = default;
};

/// Positions [begin, end), ascending and apart.
using PositionSpans = std::vector<std::pair<Position, Position>>;

/// Non-overlapping spans, ascending. What no span covers is unprotected text.
class Tags {
 public:
  Tags() = default;
  /// Throws on spans that `spans()` could not have given.
  explicit Tags(std::vector<TagSpan> spans) {
    for (std::size_t i = 0; i < spans.size(); ++i) {
      check(spans[i]);
      require(i == 0 || spans[i].begin >= spans[i - 1].end, "tag: span [", spans[i].begin, ", ", spans[i].end,
              ") follows one that ends at ", i == 0 ? 0 : spans[i - 1].end, ", spans must ascend and not overlap");
    }
    spans_ = std::move(spans);
  }

  /// Later spans win over what they cover. Cost: the number of spans. Throws on an empty or negative span, on classes and
  /// images out of range.
  void add(const TagSpan& span) {
    check(span);
    std::vector<TagSpan> next;
    next.reserve(spans_.size() + 2);
    for (const TagSpan& old : spans_) {
      if (old.end <= span.begin || old.begin >= span.end) {
        next.push_back(old);
        continue;
      }
      if (old.begin < span.begin) next.push_back(with_range(old, old.begin, span.begin));
      if (old.end > span.end) next.push_back(with_range(old, span.end, old.end));
    }
    next.push_back(span);
    std::sort(next.begin(), next.end(), [](auto& a, auto& b) { return a.begin < b.begin; });
    spans_ = std::move(next);
  }

  const std::vector<TagSpan>& spans() const { return spans_; }

  /// The span that covers a position, or null. Cost: log of the number of spans.
  const TagSpan* find(Position p) const {
    auto after =
        std::upper_bound(spans_.begin(), spans_.end(), p, [](Position at, const TagSpan& s) { return at < s.begin; });
    if (after == spans_.begin()) return nullptr;
    const TagSpan& s = *std::prev(after);
    return p < s.end ? &s : nullptr;
  }

  TokenClass class_of(Position p) const {
    const TagSpan* s = find(p);
    return s ? s->token_class : TokenClass::text;
  }

  /// Where the spans stand for which `wanted(const TagSpan*)`; null stands for what no span covers.
  template <class F>
  PositionSpans where(F&& wanted) const {
    PositionSpans out;
    const auto add = [&](Position begin, Position end) {
      if (begin >= end) return;
      if (!out.empty() && out.back().second == begin)
        out.back().second = end;
      else
        out.emplace_back(begin, end);
    };
    Position covered = 0;
    const bool between = wanted(static_cast<const TagSpan*>(nullptr));
    for (const TagSpan& span : spans_) {
      if (between) add(covered, span.begin);
      if (wanted(&span)) add(span.begin, span.end);
      covered = span.end;
    }
    if (between) add(covered, std::numeric_limits<Position>::max());
    return out;
  }
  /// Where tokens of these classes stand.
  PositionSpans of_class(ClassSet classes) const {
    return where([&](const TagSpan* s) { return classes.has(s != nullptr ? s->token_class : TokenClass::text); });
  }

  Index bytes() const { return static_cast<Index>(spans_.capacity() * sizeof(TagSpan)); }
  friend bool operator==(const Tags&, const Tags&) = default;

 private:
  static void check(const TagSpan& span) {
    require(0 <= span.begin && span.begin < span.end, "tag: span [", span.begin, ", ", span.end,
            "), must be non-empty and not negative");
    require(static_cast<int>(span.token_class) < token_classes, "tag: class ", static_cast<int>(span.token_class),
            ", must be below ", token_classes);
    require(span.image >= -1, "tag: image = ", span.image, ", must be -1 (none) or a number of an image");
    require(span.grid_rows >= 0 && span.grid_cols >= 0, "tag: grid of ", span.grid_rows, " rows and ", span.grid_cols,
            " columns, must not be negative");
  }
  static TagSpan with_range(TagSpan s, Position begin, Position end) {
    s.begin = begin, s.end = end;
    return s;
  }
  std::vector<TagSpan> spans_;
};

}  // namespace kvpare
