#include "tokenizer.hpp"

#include <charconv>
#include <cmath>
#include <cstring>
#include <queue>

#include "support/bad_file.hpp"

namespace story {
namespace {

using example::expect;

constexpr int first_byte_token = 3;

/// Takes a number from the front of the bytes. Throws BadFile.
template <class T>
T take(std::string_view& bytes, const std::string& name, const char* what, Index token) {
  expect(bytes.size() >= sizeof(T), name, "ends within the ", what, " of token ", token);
  T value;
  std::memcpy(&value, bytes.data(), sizeof(T));
  bytes.remove_prefix(sizeof(T));
  return value;
}

/// A pair of neighbours that may be joined; what it was made from may have been joined since.
struct Join {
  float score;
  int at;                                    // the left one
  int left, right, joined;                   // tokens
  bool operator<(const Join& other) const {  // the queue gives the largest: best score, then leftmost
    return score != other.score ? score < other.score : at > other.at;
  }
};

/// One token of a text on its way to fewer tokens; those that stay form a list.
struct Link {
  int token;
  int before, after;  // -1 at the ends
};

}  // namespace

std::size_t character_bytes(std::string_view text) {
  const auto first = static_cast<unsigned char>(text[0]);
  const std::size_t promised = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : first >= 0xc0 ? 2 : 1;
  std::size_t size = 1;
  while (size < promised && size < text.size() && (static_cast<unsigned char>(text[size]) & 0xc0) == 0x80) ++size;
  return size;
}

Tokenizer Tokenizer::parse(std::string_view bytes, const std::string& name, Index vocabulary) {
  Tokenizer out;
  out.name_ = name;
  expect(bytes.size() >= sizeof(std::int32_t), name, bytes.size(), " bytes, too short for a tokenizer");
  const auto longest = take<std::int32_t>(bytes, name, "length", 0);
  for (Index token = 0; token < vocabulary; ++token) {
    const auto score = take<float>(bytes, name, "score", token);
    expect(std::isfinite(score), name, "token ", token, " has the score ", score, ", must be finite");
    const auto size = take<std::int32_t>(bytes, name, "length", token);
    expect(size >= 0 && size <= longest, name, "token ", token, " has ", size, " bytes, must be within [0, ", longest,
           "], the longest as the file says");
    expect(static_cast<std::size_t>(size) <= bytes.size(), name, "token ", token, " has ", size, " bytes, only ",
           bytes.size(), " are left");
    out.pieces_.emplace_back(bytes.substr(0, static_cast<std::size_t>(size)));
    bytes.remove_prefix(static_cast<std::size_t>(size));
    out.scores_.push_back(score);
    out.tokens_.emplace(out.pieces_.back(), static_cast<int>(token));
  }
  expect(bytes.empty(), name, bytes.size(), " bytes follow the ", vocabulary,
         " tokens that the model has; is it another model's tokenizer?");
  return out;
}

std::vector<int> Tokenizer::encode(std::string_view text) const {
  if (text.empty()) return {};
  std::vector<Link> links;
  const auto add_character = [&](std::string_view character) {
    const auto found = tokens_.find(std::string(character));
    if (found != tokens_.end()) {
      links.push_back({found->second, 0, 0});
      return;
    }
    for (const char c : character) {
      const int token = static_cast<unsigned char>(c) + first_byte_token;
      expect(token < vocabulary(), name_, "has no token for the byte ", static_cast<int>(static_cast<unsigned char>(c)),
             " of the text: ", vocabulary(), " tokens, must be more than ", token);
      links.push_back({token, 0, 0});
    }
  };
  add_character(" ");
  while (!text.empty()) {
    const std::size_t size = character_bytes(text);
    add_character(text.substr(0, size));
    text.remove_prefix(size);
  }
  for (std::size_t i = 0; i < links.size(); ++i) {
    links[i].before = static_cast<int>(i) - 1;
    links[i].after = i + 1 < links.size() ? static_cast<int>(i) + 1 : -1;
  }

  std::priority_queue<Join> joins;
  const auto link = [&](int at) -> Link& { return links[static_cast<std::size_t>(at)]; };
  const auto piece = [&](int token) -> const std::string& { return pieces_[static_cast<std::size_t>(token)]; };
  const auto consider = [&](int at) {
    if (at < 0 || link(at).after < 0) return;
    const int left = link(at).token, right = link(link(at).after).token;
    const auto found = tokens_.find(piece(left) + piece(right));
    if (found != tokens_.end())
      joins.push({scores_[static_cast<std::size_t>(found->second)], at, left, right, found->second});
  };
  for (std::size_t i = 0; i < links.size(); ++i) consider(static_cast<int>(i));
  while (!joins.empty()) {
    const Join join = joins.top();
    joins.pop();
    Link& left = link(join.at);
    if (left.token != join.left || left.after < 0 || link(left.after).token != join.right) continue;
    Link& right = link(left.after);
    left.token = join.joined;
    right.token = -1;  // no join has it
    left.after = right.after;
    if (left.after >= 0) link(left.after).before = join.at;
    consider(left.before);
    consider(join.at);
  }

  std::vector<int> tokens;
  for (int at = 0; at >= 0; at = link(at).after) tokens.push_back(link(at).token);
  return tokens;
}

std::string Tokenizer::decode(int previous, int token) const {
  if (token == begin_of_text || token == end_of_text) return {};
  const std::string& piece = pieces_[static_cast<std::size_t>(token)];
  if (piece.size() == 6 && piece.starts_with("<0x") && piece.back() == '>') {
    unsigned byte = 0;
    const auto [end, error] = std::from_chars(piece.data() + 3, piece.data() + 5, byte, 16);
    if (error == std::errc{} && end == piece.data() + 5) return std::string(1, static_cast<char>(byte));
  }
  return previous == begin_of_text && piece.starts_with(' ') ? piece.substr(1) : piece;
}

}  // namespace story
