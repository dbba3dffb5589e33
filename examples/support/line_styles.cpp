#include "line_styles.hpp"

#include <algorithm>
#include <map>
#include <sstream>
#include <string_view>

namespace example {
namespace {

struct RecipeColour {
  std::string_view recipe;
  Rgb colour;
};
constexpr RecipeColour colours[] = {
    {"full", {60, 60, 60}},       {"random", {140, 140, 140}},  {"streaming_llm", {150, 100, 60}},
    {"h2o", {30, 140, 70}},       {"tova", {130, 80, 170}},     {"key_norm", {20, 160, 165}},
    {"key_diff", {215, 90, 160}}, {"snap_kv", {31, 110, 180}},  {"pyramid_kv", {225, 140, 20}},
    {"ada_kv", {110, 190, 235}},  {"vl_cache", {90, 60, 200}},  {"prefix_kv", {0, 130, 130}},
    {"corm", {120, 140, 20}},     {"kv_crush", {60, 150, 255}}, {"chunk_kv", {40, 90, 120}},
    {"zip_vl", {170, 30, 110}},   {"air_cache", {205, 35, 45}},
    {"csp", {120, 120, 90}},      {"lag_kv", {90, 60, 60}},   {"expected_attention", {60, 60, 150}},
    {"top_v", {140, 95, 60}},
};

Rgb colour_of(std::string_view recipe) {
  const auto found =
      std::find_if(std::begin(colours), std::end(colours), [&](const RecipeColour& c) { return c.recipe == recipe; });
  return found != std::end(colours) ? found->colour : Rgb{150, 150, 40};
}

}  // namespace

std::vector<LineStyle> line_styles(const std::vector<std::string>& policies) {
  static constexpr int markers[] = {7, 6, 5, 4, 9, 8};
  static constexpr int dashes[] = {1, 2, 4, 3, 5, 1};
  std::map<std::string, std::size_t> variants;  // of a recipe, so far
  std::vector<LineStyle> styles;
  for (const std::string& policy : policies) {
    const std::string recipe = policy.substr(0, policy.find_first_of(" ("));
    const std::size_t variant = variants[recipe]++ % std::size(markers);
    const double lighter = std::min(0.4, 0.13 * static_cast<double>(variant));
    styles.push_back({mix(colour_of(recipe), white, lighter), markers[variant], dashes[variant]});
  }
  return styles;
}

std::string look(const LineStyle& style, bool is_level) {
  std::ostringstream out;
  out << "with " << (is_level ? "lines" : "linespoints") << " lw 2 dt " << (is_level ? 3 : style.dash);
  if (!is_level) out << " pt " << style.marker << " ps 0.7";
  out << " lc rgb '" << style.colour.hex() << "'";
  return out.str();
}

int key_rows(std::size_t entries, int columns) { return (static_cast<int>(entries) + columns - 1) / columns; }

void draw_key(Picture& picture, const std::vector<KeyEntry>& entries, int columns, double left, double top,
              double width) {
  const int rows = key_rows(entries.size(), columns);
  const double column = width / columns, height = key_row * rows;
  auto& g = picture.script;
  g << "unset border\nunset tics\nunset title\nunset xlabel\nunset ylabel\nunset grid\nunset logscale x\nset xrange [0:"
    << width << "]\nset yrange [" << height << ":0]\n";
  picture.place(left, top, width, height);
  std::ostringstream samples;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const double x = column * static_cast<double>(static_cast<int>(i) / rows);
    const double y = key_row * (static_cast<double>(static_cast<int>(i) % rows) + 0.5);
    g << "$sample" << i << " << EOD\n"
      << x << ' ' << y << '\n'
      << x + 22 << ' ' << y << '\n'
      << x + 44 << ' ' << y << "\nEOD\n";
    samples << (i > 0 ? ", " : "") << "$sample" << i << ' ' << entries[i].look;
    picture.write(entries[i].words, left + x + 54, top + y, "left textcolor rgb '#222222'");
  }
  picture.plot(samples.str());
}

}  // namespace example
