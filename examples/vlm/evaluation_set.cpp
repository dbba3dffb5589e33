#include "evaluation_set.hpp"

#include <nlohmann/json.hpp>
#include <sstream>

namespace vlm {
namespace {

using example::expect;
using example::read_bytes;
using nlohmann::json;

std::vector<int> read_tokens(const json& turn, const char* field) {
  auto tokens = turn.at(field).get<std::vector<int>>();
  if (tokens.empty()) throw BadFile(std::string(field) + " is empty");
  for (const int token : tokens)
    if (token < 0 || token >= vocabulary_size)
      throw BadFile(std::string(field) + " holds token " + std::to_string(token) + ", the vocabulary ends at " +
                    std::to_string(vocabulary_size - 1));
  return tokens;
}

Turn read_turn(const json& from) {
  Turn turn;
  turn.kind = from.at("kind").get<std::string>();
  turn.prompt = read_tokens(from, "q");
  turn.answer = read_tokens(from, "a");
  if (from.contains("ref")) turn.reference = read_tokens(from, "ref");
  if (from.contains("logits")) {
    turn.logits = from.at("logits").get<std::vector<float>>();
    if (std::ssize(turn.logits) != vocabulary_size)
      throw BadFile(std::to_string(turn.logits.size()) + " logits, must be one per word");
  }
  return turn;
}

Scene read_scene(const json& from) {
  Scene scene;
  scene.describe = read_turn(from.at("desc"));
  scene.first = read_turn(from.at("turn1"));
  for (const json& turn : from.at("same")) scene.same.push_back(read_turn(turn));
  for (const json& turn : from.at("other")) scene.other.push_back(read_turn(turn));
  return scene;
}

/// Runs `read`; whatever it finds wrong is reported with the place in front.
template <class Read>
auto at(const std::string& place, Read&& read) {
  try {
    return read();
  } catch (const std::exception& error) {
    throw BadFile(place + ": " + error.what());
  }
}

}  // namespace

EvaluationSet read_evaluation_set(const std::string& folder) {
  EvaluationSet set;
  const std::string words_file = folder + "/vocab.json";
  set.vocabulary = at(words_file, [&] { return json::parse(read_bytes(words_file)).get<std::vector<std::string>>(); });
  expect(std::ssize(set.vocabulary) == vocabulary_size, words_file, set.vocabulary.size(), " words, must be ",
         vocabulary_size);

  const std::string scenes_file = folder + "/eval128.jsonl";
  std::istringstream lines(read_bytes(scenes_file));
  for (std::string line; std::getline(lines, line);)
    set.scenes.push_back(at(scenes_file + " line " + std::to_string(set.scenes.size() + 1),
                            [&] { return read_scene(json::parse(line)); }));
  expect(!set.scenes.empty(), scenes_file, "no scenes");

  const std::string images_file = folder + "/eval128.bin";
  const std::string images = read_bytes(images_file);
  expect(std::ssize(images) == std::ssize(set.scenes) * image_bytes, images_file, images.size(), " bytes, must be ",
         std::ssize(set.scenes) * image_bytes, ": one image of ", image_bytes, " per line of eval128.jsonl");
  for (std::size_t i = 0; i < set.scenes.size(); ++i) {
    const auto begin = images.begin() + static_cast<std::ptrdiff_t>(i) * image_bytes;
    set.scenes[i].image.assign(begin, begin + image_bytes);
  }
  return set;
}

}  // namespace vlm
