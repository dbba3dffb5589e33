#include "saved.hpp"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <kvpare/core/random.hpp>
#include <nlohmann/json.hpp>

#include "evaluate.hpp"
#include "support/bad_file.hpp"

namespace story {
namespace {

using example::BadFile;
using example::expect;
using Json = nlohmann::ordered_json;

constexpr std::string_view magic = "kvstory1";
constexpr std::size_t fixed_bytes = 16;  // magic and length

/// A member of the head. Throws Json::exception when it is missing or of another type.
template <class T>
T member(const Json& head, const char* name) {
  const Json& value = head.at(name);
  if constexpr (std::is_same_v<T, bool>)
    return value.get_ref<const Json::boolean_t&>();
  else if constexpr (std::is_same_v<T, std::string>)
    return value.get_ref<const Json::string_t&>();
  else if constexpr (std::is_same_v<T, std::uint64_t>)
    return value.get_ref<const Json::number_unsigned_t&>();
  else
    return value.get<T>();
}

/// A whole number within [0, most].
Index count(const Json& head, const char* name, Index most, const std::string& file) {
  const auto number = member<std::uint64_t>(head, name);
  expect(number <= static_cast<std::uint64_t>(most), file, name, " = ", number, ", must be within [0, ", most, "]");
  return static_cast<Index>(number);
}

}  // namespace

Method method_of(const Terms& terms, Index layers) {
  std::vector<kvpare::Keep> budgets;
  if (!terms.budget.empty()) budgets.push_back(parse_budget(terms.budget));
  const std::vector<Setting> settings = make_settings(
      {terms.policy}, budgets, layers, terms.block, terms.all_in_blocks ? AtDecode::each_block : AtDecode::each_token);
  kvpare::require(settings.size() == 1, terms.policy, ": needs a budget, e.g. 32t");
  return settings[0].method;
}

std::string fingerprint(std::string_view model_file) {
  std::uint64_t bits = kvpare::mix_bits(model_file.size());
  for (; model_file.size() >= 8; model_file.remove_prefix(8)) {
    std::uint64_t word;
    std::memcpy(&word, model_file.data(), sizeof word);
    bits = kvpare::mix_bits(bits ^ word);
  }
  for (const char c : model_file) bits = kvpare::mix_bits(bits ^ static_cast<unsigned char>(c));
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(bits));
  return text;
}

std::string print_saved(const Saved& saved) {
  const Json head = {{"model", saved.model},
                     {"tokens", saved.draft.tokens},
                     {"read", saved.image.tokens},
                     {"finished", saved.draft.finished},
                     {"temperature", saved.draft.sampling.temperature},
                     {"seed", saved.draft.sampling.seed},
                     {"policy", saved.terms.policy},
                     {"budget", saved.terms.budget},
                     {"block", saved.terms.block},
                     {"all_in_blocks", saved.terms.all_in_blocks},
                     {"page_tokens", saved.terms.page_tokens}};
  const std::string text = head.dump();
  std::string bytes(magic);
  for (std::size_t i = 0; i < 8; ++i) bytes += static_cast<char>(text.size() >> (8 * i) & 0xff);
  return bytes + text + saved.image.bytes;
}

Saved parse_saved(std::string_view bytes, const std::string& name, const Shape& shape, const std::string& model) {
  expect(bytes.substr(0, magic.size()) == magic, name, "is no saved text: must begin with '", magic, "'");
  expect(bytes.size() >= fixed_bytes, name, "ends within the length of its head");
  std::uint64_t head_bytes = 0;
  for (std::size_t i = fixed_bytes; i-- > magic.size();)
    head_bytes = head_bytes << 8 | static_cast<unsigned char>(bytes[i]);
  expect(head_bytes <= bytes.size() - fixed_bytes, name, "head of ", head_bytes, " bytes, only ",
         bytes.size() - fixed_bytes, " follow its length");
  const std::string_view text = bytes.substr(fixed_bytes, static_cast<std::size_t>(head_bytes));

  Saved saved;
  saved.image.bytes = bytes.substr(fixed_bytes + static_cast<std::size_t>(head_bytes));
  try {
    const Json head = Json::parse(text);
    saved.model = member<std::string>(head, "model");
    expect(saved.model == model, name, "was written by another model (", saved.model, ", this one is ", model, ")");
    for (const Json& token : head.at("tokens")) {
      expect(token.is_number_unsigned() && token.get<std::uint64_t>() < static_cast<std::uint64_t>(shape.vocabulary),
             name, "tokens hold ", token.dump(), ", must be within [0, ", shape.vocabulary, ")");
      saved.draft.tokens.push_back(token.get<int>());
    }
    expect(std::ssize(saved.draft.tokens) <= shape.longest + 1, name, saved.draft.tokens.size(),
           " tokens, more than the model's longest sequence, ", shape.longest);
    saved.image.tokens = static_cast<Position>(
        count(head, "read", std::min<Index>(std::ssize(saved.draft.tokens), shape.longest), name));
    saved.draft.finished = member<bool>(head, "finished");
    expect(saved.draft.finished || saved.image.tokens < std::ssize(saved.draft.tokens), name,
           "all tokens have been read, but the text is not finished");
    saved.draft.sampling.temperature = member<double>(head, "temperature");
    expect(saved.draft.sampling.temperature >= 0 && std::isfinite(saved.draft.sampling.temperature), name,
           "temperature = ", saved.draft.sampling.temperature, ", must be 0 or positive");
    saved.draft.sampling.seed = member<std::uint64_t>(head, "seed");
    saved.terms.policy = member<std::string>(head, "policy");
    saved.terms.budget = member<std::string>(head, "budget");
    saved.terms.block = count(head, "block", Index{1} << 30, name);
    saved.terms.all_in_blocks = member<bool>(head, "all_in_blocks");
    saved.terms.page_tokens = count(head, "page_tokens", 64, name);
  } catch (const Json::exception& error) {
    throw BadFile(name + ": the head is not what it should be: " + error.what());
  }
  return saved;
}

}  // namespace story
