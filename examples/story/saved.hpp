// A text put aside: what is needed to write it on as if nothing had happened.
//
//   8 bytes   "kvstory1"
//   8 bytes   length of the head, little-endian
//   the head  JSON: the tokens, how they are chosen, under which policy, and which model it was
//   the rest  the cache, as kvpare::save writes it
#pragma once

#include <string>
#include <string_view>

#include "writer.hpp"

namespace story {

/// Under what a text is written, as the user said it.
struct Terms {
  std::string policy = "full";
  std::string budget = {};  // empty: none
  Index block = 16;
  bool all_in_blocks = false;
  Index page_tokens = 16;
  friend bool operator==(const Terms&, const Terms&) = default;
};

/// The method that these words mean for a model of so many layers. Throws InvalidArgument, also where the policy needs a
/// budget and has none.
Method method_of(const Terms& terms, Index layers);

struct Saved {
  Draft draft = {};
  Context::Image image = {};
  Terms terms = {};
  std::string model = {};  // see fingerprint
};

/// Tells models apart: 16 hexadecimal digits of the file's bytes.
std::string fingerprint(std::string_view model_file);

std::string print_saved(const Saved& saved);

/// `name` stands for the file in messages. Checks everything but the cache's bytes against the model. Throws BadFile.
Saved parse_saved(std::string_view bytes, const std::string& name, const Shape& shape, const std::string& model);

}  // namespace story
