// The JSON keeps its form: names, order and types are those of golden.json, and so are the values that follow from
// arithmetic on whole numbers alone. The table and the picture show what the results say.
#include "../report.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <nlohmann/json.hpp>

#include "../plot.hpp"
#include "support/bad_file.hpp"
#include "support/picture.hpp"
#include "traces.hpp"

namespace {

using namespace inspect;
using example::Trace;
using Json = nlohmann::ordered_json;

Trace sample() {
  Trace trace = trace_of(12);
  trace.token_class = {4, 4, 0, 1, 1, 1, 1, 1, 1, 0, 9, 0};
  trace.metadata = {{"model", "none"}, {"rope_theta", "10000"}};
  add_random_layer<kvpare::half>(trace, {2, 1, 4, 4}, 1);
  add_random_layer<kvpare::half>(trace, {4, 2, 4, 8}, 2);
  return trace;
}

const std::vector<std::string> policies = {"streaming_llm(keep=0.5)", "full"};
const Options options{.page_tokens = 16, .rows = 3, .scores = true};

std::string kind(const Json& value) { return value.is_number_unsigned() ? "number" : value.type_name(); }

/// Every difference of form between two documents, as "where: what".
void compare(const Json& found, const Json& wanted, const std::string& where, std::vector<std::string>& differences) {
  if (kind(found) != kind(wanted)) {
    differences.push_back(where + ": " + kind(found) + ", must be " + kind(wanted));
    return;
  }
  if (where.ends_with("/settings")) {  // whatever the policy has, as texts
    for (const auto& [name, text] : found.items())
      if (!text.is_string()) differences.push_back(where + "/" + name + ": " + kind(text) + ", must be string");
    return;
  }
  if (found.is_structured()) {
    if (found.size() != wanted.size()) {
      differences.push_back(where + ": " + std::to_string(found.size()) + " parts, must be " +
                            std::to_string(wanted.size()));
      return;
    }
    auto other = wanted.items().begin();
    for (const auto& [name, part] : found.items()) {
      if (name != other.key())
        differences.push_back(where + ": '" + name + "' stands where '" + other.key() + "' must");
      compare(part, other.value(), where + "/" + name, differences);
      ++other;
    }
    return;
  }
  // How long lists and records are in memory is the platform's business, the last digits of errors are the compiler's.
  const bool of_platform = where.find("/bytes_") != std::string::npos && where.find("/pages") == std::string::npos &&
                           where.find("/live") == std::string::npos;
  if (of_platform) return;
  const bool same = found.is_number() ? std::abs(found.get<double>() - wanted.get<double>()) <=
                                            1e-5 * std::max(1.0, std::abs(wanted.get<double>()))
                                      : found == wanted;
  if (!same) differences.push_back(where + ": " + found.dump() + ", must be " + wanted.dump());
}

TEST(JsonTest, KeepsItsForm) {
  const Trace trace = sample();
  const std::string text = print_json("sample.safetensors", trace, run(trace, policies, options), options);
  const std::string golden = example::read_bytes(KVPARE_INSPECT_GOLDEN);
  std::vector<std::string> differences;
  compare(Json::parse(text), Json::parse(golden), "", differences);
  for (const std::string& difference : differences) ADD_FAILURE() << difference;
  EXPECT_EQ(Json::parse(golden)["version"], json_version);
  if (HasFailure()) std::cout << text;  // the new golden.json, if the change is meant
}

TEST(JsonTest, TheComparisonSeesChanges) {
  const Json golden = Json::parse(example::read_bytes(KVPARE_INSPECT_GOLDEN));
  const auto differs = [&](auto&& change) {
    Json changed = golden;
    change(changed);
    std::vector<std::string> differences;
    compare(changed, golden, "", differences);
    return !differences.empty();
  };
  EXPECT_FALSE(differs([](Json&) {}));
  EXPECT_TRUE(differs([](Json& j) { j.erase("rows"); }));
  EXPECT_TRUE(differs([](Json& j) { j["rows"] = "3"; }));
  EXPECT_TRUE(differs([](Json& j) { j["runs"][0]["settings"]["keep"] = 0.5; }));
  EXPECT_TRUE(differs([](Json& j) { j["runs"][0]["layers"][1]["kept"][0][0] = 1; }));
  EXPECT_TRUE(differs([](Json& j) { j["runs"][0]["layers"][1]["budget"] = nullptr; }));
  EXPECT_TRUE(differs([](Json& j) { j["runs"][0]["bytes_before"]["total"] = nullptr; }));
  EXPECT_TRUE(differs([](Json& j) { j["runs"][0]["bytes_before"]["pages"] = 1; }));
}

TEST(JsonTest, ScoresOnlyWhenAskedFor) {
  const Trace trace = sample();
  Options without = options;
  without.scores = false;
  const Json json = Json::parse(print_json("s", trace, run(trace, policies, without), without));
  EXPECT_FALSE(json["runs"][0]["layers"][0].contains("scores"));
}

TEST(JsonTest, WhatIsNoNumberIsNull) {
  Trace trace = sample();
  auto* keys = reinterpret_cast<kvpare::half*>(trace.layers[0].keys.values.data());
  keys[0] = kvpare::half(std::numeric_limits<float>::quiet_NaN());
  const auto results = run(trace, {"h2o(keep=0.5)"}, options);
  EXPECT_GT(results[0].nan_scores, 0);
  const Json json = Json::parse(print_json("s", trace, results, options));
  EXPECT_TRUE(json["runs"][0]["layers"][0]["relative_l2"].is_null());
  EXPECT_TRUE(json["runs"][0]["relative_l2"].is_null());
  EXPECT_TRUE(json["runs"][0]["layers"][1]["relative_l2"].is_number());
  std::ostringstream table;
  print_tables(table, "s", trace, results, options);
  EXPECT_NE(table.str().find("scores were not numbers"), std::string::npos) << table.str();
}

TEST(ReportTest, ClassesAreRuns) {
  const auto runs = class_runs(sample());
  ASSERT_EQ(runs.size(), 6u);
  EXPECT_EQ(runs[0].name, "system");
  EXPECT_EQ(runs[2].name, "image");
  EXPECT_EQ(runs[2].begin, 3);
  EXPECT_EQ(runs[2].end, 9);
  EXPECT_EQ(runs[4].name, "class 9");
  EXPECT_EQ(print_tokens(sample()), "12 tokens (3 text, 6 image, 2 system, 1 class 9)");
  EXPECT_EQ(print_tokens(trace_of(3)), "3 tokens (3 text)");
}

TEST(ReportTest, TheTableSaysWhatTheResultsSay) {
  const Trace trace = sample();
  std::ostringstream out;
  print_tables(out, "sample", trace, run(trace, policies, options), options);
  const std::string table = out.str();
  for (const char* part :
       {"sample: 2 layers, 12 tokens (3 text, 6 image, 2 system, 1 class 9), 2-4 query heads on 1-2 kv heads, half",
        "pages of 16 tokens, half", "of the last 3 rows", "streaming_llm(keep=0.5)", "nothing was evicted",
        // budget, kept, KiB before and after: one page each way
        "    0         6         6.0       0.2       0.2", "    1         6         6.0       0.8       0.8"})
    EXPECT_NE(table.find(part), std::string::npos) << part << "\nis not in\n" << table;
}

TEST(PlotTest, AnyNumberOfLayersAndTokensIsDrawn) {
  if (!example::gnuplot_found()) GTEST_SKIP() << "gnuplot is not installed";
  std::string folder = ::testing::TempDir() + "kvpare_inspect_XXXXXX";
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  const std::string file = folder + "/it's.svg";  // a name that needs quoting
  for (const auto& [layers, tokens] : {std::pair<unsigned, Index>(1, 1), {40, 2000}}) {
    Trace trace = trace_of(tokens);
    for (unsigned l = 0; l < layers; ++l) add_random_layer<kvpare::half>(trace, {1, 1, 2, 2}, l);
    const auto results = run(trace, {"random(keep=0.5)", "streaming_llm(keep=0.1)"}, {.rows = 2});
    plot(file, "a title", trace, results, {.rows = 2});
    const std::string svg = example::read_bytes(file);
    for (const char* words : {"a title", "random(keep=0.5)", "streaming_llm(keep=0.1)", "L2 error, last", "</svg>"})
      EXPECT_NE(svg.find(words), std::string::npos) << words;
    EXPECT_LT(svg.size(), 3u << 20);
  }
  std::remove(file.c_str());
  std::remove(folder.c_str());
}

}  // namespace
