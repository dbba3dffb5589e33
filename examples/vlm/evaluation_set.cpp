#include "evaluation_set.hpp"

#include <nlohmann/json.hpp>
#include <sstream>

namespace vlm {
namespace {

using nlohmann::json;

std::vector<int> read_tokens(const json& turn, const char* field, std::size_t words) {
  const auto tokens = turn.at(field).get<std::vector<int>>();
  if (tokens.empty()) throw BadFile(std::string(field) + " is empty");
  for (const int token : tokens)
    if (token < 0 || static_cast<std::size_t>(token) >= words)
      throw BadFile(std::string(field) + " holds token " + std::to_string(token) + ", the vocabulary ends at " +
                    std::to_string(words - 1));
  return tokens;
}

Turn read_turn(const json& from, std::size_t words) {
  Turn turn;
  turn.kind = from.at("kind").get<std::string>();
  turn.prompt = read_tokens(from, "q", words);
  turn.answer = read_tokens(from, "a", words);
  turn.reference = read_tokens(from, "ref", words);
  if (from.contains("logits")) {
    turn.logits = from.at("logits").get<std::vector<float>>();
    if (turn.logits.size() != words)
      throw BadFile(std::to_string(turn.logits.size()) + " logits, must be one per word");
  }
  return turn;
}

Scene read_scene(const json& from, std::size_t words) {
  Scene scene;
  for (const json& object : from.at("objs"))
    scene.objects.push_back(object.at(0).get<std::string>() + " " + object.at(1).get<std::string>() + " row" +
                            std::to_string(object.at(2).get<int>()) + " col" + std::to_string(object.at(3).get<int>()));
  scene.describe = read_turn(from.at("desc"), words);
  scene.first = read_turn(from.at("turn1"), words);
  for (const json& turn : from.at("same")) scene.same.push_back(read_turn(turn, words));
  for (const json& turn : from.at("other")) scene.other.push_back(read_turn(turn, words));
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
  expect(set.vocabulary.size() > end_of_answer, words_file, set.vocabulary.size(), " words, <eos> must be one of them");

  const std::string scenes_file = folder + "/eval128.jsonl";
  std::istringstream lines(read_bytes(scenes_file));
  for (std::string line; std::getline(lines, line);)
    set.scenes.push_back(at(scenes_file + " line " + std::to_string(set.scenes.size() + 1),
                            [&] { return read_scene(json::parse(line), set.vocabulary.size()); }));

  const std::string images_file = folder + "/eval128.bin";
  const std::string images = read_bytes(images_file);
  expect(images.size() == set.scenes.size() * image_bytes, images_file, images.size(), " bytes, must be ",
         set.scenes.size() * image_bytes, ": one image of ", image_bytes, " per line of eval128.jsonl");
  for (std::size_t i = 0; i < set.scenes.size(); ++i)
    set.scenes[i].image.assign(images.begin() + static_cast<std::ptrdiff_t>(i * image_bytes),
                               images.begin() + static_cast<std::ptrdiff_t>((i + 1) * image_bytes));
  return set;
}

}  // namespace vlm
