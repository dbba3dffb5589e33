// How policies look in pictures, the same in all of them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "picture.hpp"

namespace example {

struct LineStyle {
  Rgb colour;
  int marker, dash;
};

/// What policies have in common, for pictures of many.
enum class Family { window, every_row, pictures, no_attention, other };
inline constexpr std::size_t family_count = 5;
Family family_of(std::string_view policy);
std::string_view name_of(Family family);

/// One per policy ("h2o(recent_share=0)"): a recipe has one colour; its variants differ in shade, marker and dash.
std::vector<LineStyle> line_styles(const std::vector<std::string>& policies);

/// In gnuplot's words. A level is dotted and has no points.
std::string look(const LineStyle& style, bool is_level);

/// The same for a policy that is one point.
std::string look_of_point(const LineStyle& style);

struct KeyEntry {
  std::string words, look;
  bool is_point = false;
};

/// Height of a row of a key, in pixels.
inline constexpr double key_row = 24;

/// The key to a picture's lines, drawn by hand, since gnuplot's own drops what it thinks does not fit. Column after column;
/// changes axes and ranges, so it comes last.
void draw_key(Picture& picture, const std::vector<KeyEntry>& entries, int columns, double left, double top,
              double width);

/// Rows of that key.
int key_rows(std::size_t entries, int columns);

}  // namespace example
