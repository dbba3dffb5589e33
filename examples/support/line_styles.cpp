#include "line_styles.hpp"

#include <algorithm>
#include <map>
#include <sstream>
#include <string_view>

namespace example {
namespace {

struct RecipeStyle {
  std::string_view recipe;
  Family family;
  Rgb colour;  // told apart from the others of its family
};
constexpr RecipeStyle recipes[] = {
    {"pare", Family::window, {215, 20, 60}},
    {"snap_kv", Family::window, {31, 110, 180}},
    {"pyramid_kv", Family::window, {225, 140, 20}},
    {"ada_kv", Family::window, {110, 190, 235}},
    {"kv_crush", Family::window, {40, 150, 90}},
    {"chunk_kv", Family::window, {140, 70, 40}},
    {"tova", Family::window, {130, 80, 170}},
    {"recent_maximum", Family::window, {165, 175, 40}},
    {"h2o", Family::every_row, {30, 140, 70}},
    {"prefix_kv", Family::every_row, {150, 70, 180}},
    {"elastic_cache", Family::every_row, {230, 120, 30}},
    {"cam", Family::every_row, {200, 60, 110}},
    {"corm", Family::every_row, {120, 140, 20}},
    {"expected_attention", Family::every_row, {50, 80, 190}},
    {"air_cache", Family::pictures, {205, 35, 45}},
    {"csp", Family::pictures, {225, 150, 20}},
    {"vl_cache", Family::pictures, {90, 60, 200}},
    {"zip_vl", Family::pictures, {20, 150, 160}},
    {"top_v", Family::pictures, {140, 95, 60}},
    {"cross_modal", Family::pictures, {60, 150, 60}},
    {"random", Family::no_attention, {140, 140, 140}},
    {"streaming_llm", Family::no_attention, {150, 100, 60}},
    {"key_norm", Family::no_attention, {20, 160, 165}},
    {"key_diff", Family::no_attention, {215, 90, 160}},
    {"lag_kv", Family::no_attention, {60, 80, 190}},
    {"fixed_point", Family::no_attention, {150, 150, 40}},
    {"full", Family::other, {60, 60, 60}},
};

std::string_view recipe_of(std::string_view policy) { return policy.substr(0, policy.find_first_of(" (")); }

RecipeStyle style_of(std::string_view policy) {
  const auto found = std::find_if(std::begin(recipes), std::end(recipes),
                                  [&](const RecipeStyle& r) { return r.recipe == recipe_of(policy); });
  return found != std::end(recipes) ? *found : RecipeStyle{"", Family::other, {170, 60, 130}};
}

}  // namespace

Family family_of(std::string_view policy) { return style_of(policy).family; }

std::string_view name_of(Family family) {
  static constexpr std::string_view names[] = {"what the newest rows look at", "what every row looks at",
                                               "made for pictures", "no look at attention", "others"};
  return names[static_cast<std::size_t>(family)];
}

std::vector<LineStyle> line_styles(const std::vector<std::string>& policies) {
  static constexpr int markers[] = {7, 6, 5, 4, 9, 8};
  static constexpr int dashes[] = {1, 2, 4, 3, 5, 1};
  std::map<std::string, std::size_t> variants;  // of a recipe, so far
  std::vector<LineStyle> styles;
  for (const std::string& policy : policies) {
    const std::size_t variant = variants[std::string(recipe_of(policy))]++ % std::size(markers);
    const double lighter = std::min(0.4, 0.13 * static_cast<double>(variant));
    styles.push_back({mix(style_of(policy).colour, white, lighter), markers[variant], dashes[variant]});
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

std::string look_of_point(const LineStyle& style) {
  std::ostringstream out;
  out << "with points pt " << style.marker << " ps 1.3 lw 2 lc rgb '" << style.colour.hex() << "'";
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
    g << "$sample" << i << " << EOD\n";
    for (const double at : {0, 22, 44})
      if (at == 22 || !entries[i].is_point) g << x + at << ' ' << y << '\n';
    g << "EOD\n";
    samples << (i > 0 ? ", " : "") << "$sample" << i << ' ' << entries[i].look;
    picture.write(entries[i].words, left + x + 54, top + y, "left textcolor rgb '#222222'");
  }
  picture.plot(samples.str());
}

}  // namespace example
