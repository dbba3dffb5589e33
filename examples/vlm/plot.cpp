#include "plot.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string_view>

#include "support/bytes_picture.hpp"
#include "support/line_styles.hpp"
#include "support/picture.hpp"

namespace vlm {
namespace {

using namespace example;

// ---- the accuracy picture

/// One policy: a line over its budgets, or a level when it has none.
struct Line {
  std::string policy;
  std::vector<std::size_t> points = {};  // indices of its results, largest budget first
  bool is_level = false;
};

std::vector<Line> lines_of(const std::vector<Setting>& settings) {
  std::vector<Line> lines;
  for (std::size_t i = 0; i < settings.size(); ++i) {
    if (lines.empty() || lines.back().policy != settings[i].policy) lines.push_back({.policy = settings[i].policy});
    lines.back().points.push_back(i);
    lines.back().is_level = !settings[i].keep;
  }
  for (Line& line : lines)
    std::sort(line.points.begin(), line.points.end(),
              [&](std::size_t a, std::size_t b) { return settings[a].keep > settings[b].keep; });
  return lines;
}

std::vector<double> budgets_of(const std::vector<Setting>& settings) {
  std::vector<double> keeps;
  for (const Setting& setting : settings)
    if (setting.keep && *setting.keep > 0) keeps.push_back(*setting.keep);
  std::sort(keeps.begin(), keeps.end(), std::greater<>());
  keeps.erase(std::unique(keeps.begin(), keeps.end()), keeps.end());
  if (keeps.empty()) keeps = {1.0};
  return keeps;
}

/// What the picture shows: the first answer hardly depends on the budget (it has been read when the eviction comes), so
/// it is drawn only when nothing else was asked.
std::vector<Task> panels_of(const std::vector<Task>& tasks) {
  std::vector<Task> panels;
  for (const Task task : tasks)
    if (task != Task::turn1) panels.push_back(task);
  return panels.empty() ? tasks : panels;
}

const char* panel_title(Task task) {
  switch (task) {
    case Task::desc:
      return "describe everything (right words)";
    case Task::same:
      return "ask on about the same object";
    case Task::other:
      return "ask on about other objects";
    case Task::turn1:
      break;
  }
  return "the first question";
}

// ---- the survival picture

/// One colour per budget, from pale for the largest to dark for the smallest.
std::vector<Rgb> heat_colours(std::size_t budgets) {
  static constexpr Rgb stops[] = {{254, 217, 118}, {253, 141, 60}, {227, 26, 28}, {128, 0, 60}, {48, 0, 50}};
  constexpr std::size_t last = std::size(stops) - 1;
  std::vector<Rgb> colours;
  for (std::size_t i = 0; i < budgets; ++i) {
    const double at = budgets > 1 ? static_cast<double>(i * last) / static_cast<double>(budgets - 1) : last / 2.0;
    const std::size_t below = std::min(static_cast<std::size_t>(at), last - 1);
    colours.push_back(mix(stops[below], stops[below + 1], at - static_cast<double>(below)));
  }
  return colours;
}

/// `survived` budgets, a mean over heads and so perhaps no whole number; below 1 the colour fades.
Rgb heat_at(const std::vector<Rgb>& heat, double survived) {
  if (survived < 1) return mix(white, heat.front(), survived);
  const std::size_t below = std::min(static_cast<std::size_t>(survived), heat.size());
  if (below == heat.size()) return heat.back();
  return mix(heat[below - 1], heat[below], survived - static_cast<double>(below));
}

/// The picture as a data block; `faded` turns it to pale grey, for colours to be laid over.
std::string photo_data(const char* name, const Scene& scene, bool faded) {
  std::ostringstream out;
  out << name << " << EOD\n";
  for (Index y = 0; y < image_side; ++y) {
    for (Index x = 0; x < image_side; ++x) {
      const std::uint8_t* at = &scene.image[static_cast<std::size_t>((y * image_side + x) * 3)];
      Rgb shown{at[0], at[1], at[2]};
      if (faded) {
        const int grey = static_cast<int>(std::lround(0.299 * shown.r + 0.587 * shown.g + 0.114 * shown.b));
        shown = mix({grey, grey, grey}, white, 0.45);
      }
      out << x << ".5 " << y << ".5 " << shown.r << ' ' << shown.g << ' ' << shown.b << '\n';
    }
  }
  out << "EOD\n";
  return out.str();
}

/// The patches that survive something: x, y in pixels, colour.
std::string heat_data(const std::string& name, const std::vector<double>& patches, const std::vector<Rgb>& heat) {
  std::ostringstream out;
  out << name << " << EOD\n";
  for (std::size_t p = 0; p < patches.size(); ++p)
    if (patches[p] > 0)
      out << (static_cast<double>(p % patches_per_side) + 0.5) * patch_side << ' '
          << (static_cast<double>(p / patches_per_side) + 0.5) * patch_side << ' ' << heat_at(heat, patches[p]).packed()
          << '\n';
  out << "EOD\n";
  return out.str();
}

}  // namespace

void plot_accuracy(const std::string& path, const std::vector<Setting>& settings, const std::vector<Result>& results,
                   const EvaluateOptions& options) {
  const std::vector<Line> lines = lines_of(settings);
  std::vector<std::string> names;
  for (const Line& line : lines) names.push_back(line.policy);
  const std::vector<LineStyle> styles = line_styles(names);
  const std::vector<double> keeps = budgets_of(settings);
  const double least = keeps.back(), most = std::max(keeps.front(), 1.01 * least);
  const std::vector<Task> panels = panels_of(options.tasks);

  const int key_columns = 3;
  const double left = 70, top = 100, panel_width = 380, panel_height = 330, gap = 28, key_top = top + panel_height + 66;
  const double width = std::max(left + static_cast<double>(panels.size()) * (panel_width + gap), 1000.0);
  const double height = key_top + key_row * key_rows(lines.size(), key_columns) + 16;
  Picture picture(path, width, height);
  auto& g = picture.script;

  for (std::size_t i = 0; i < lines.size(); ++i) {
    for (const Task task : panels) {
      g << "$line" << i << name_of(task) << " << EOD\n";
      for (const std::size_t point : lines[i].points) {
        const Score& score = results[point][task];
        const double share = task == Task::desc ? score.by_token() : score.exact();
        if (lines[i].is_level)
          g << most << ' ' << share << '\n' << least << ' ' << share << '\n';
        else if (*settings[point].keep > 0)
          g << *settings[point].keep << ' ' << share << '\n';
      }
      g << "EOD\n";
    }
  }

  g << "set border 3 lc rgb '#888888'\nset tics nomirror scale 0.5 textcolor rgb '#333333'\n"
       "set grid ytics lc rgb '#e4e4e4' lt 1 lw 1\nset logscale x 10\nset yrange [0:1.03]\nset xrange ["
    << most * 1.06 << ':' << least / 1.06 << "]\nset xlabel 'visual tokens kept' textcolor rgb '#333333'\nset xtics (";
  for (std::size_t k = 0; k < keeps.size(); ++k)
    g << (k > 0 ? ", " : "") << "'" << percent(keeps[k]) << "%' " << keeps[k];
  g << ")\nset ytics ('0 %%' 0, '20 %%' 0.2, '40 %%' 0.4, '60 %%' 0.6, '80 %%' 0.8, '100 %%' 1)\n";
  picture.title("Right answers when the visual part of the KV cache shrinks",
                std::to_string(options.scenes) + " scenes of " + std::to_string(visual_tokens) +
                    " visual tokens; text is always kept",
                left);
  for (std::size_t p = 0; p < panels.size(); ++p) {
    picture.place(left + static_cast<double>(p) * (panel_width + gap), top, panel_width, panel_height);
    g << "set title " << quoted(panel_title(panels[p])) << " offset 0,-0.4 textcolor rgb '#333333'\n";
    std::ostringstream curves;
    for (std::size_t i = 0; i < lines.size(); ++i)
      curves << (i > 0 ? ", " : "") << "$line" << i << name_of(panels[p]) << ' ' << look(styles[i], lines[i].is_level);
    picture.plot(curves.str());
    g << "set ytics ('' 0, '' 0.2, '' 0.4, '' 0.6, '' 0.8, '' 1)\n";  // the next panels share the axis
  }

  std::vector<KeyEntry> key;
  for (std::size_t i = 0; i < lines.size(); ++i) key.push_back({lines[i].policy, look(styles[i], lines[i].is_level)});
  draw_key(picture, key, key_columns, left, key_top, width - left);
  picture.draw();
}

void plot_accuracy_over_bytes(const std::string& path, const std::vector<Setting>& settings,
                              const std::vector<Result>& results, const EvaluateOptions& options) {
  const std::vector<Task> panels = panels_of(options.tasks);
  BytesPicture picture{.title = "Right answers against the bytes of the KV cache",
                       .below = std::to_string(options.scenes) + " scenes of " + std::to_string(visual_tokens) +
                                " visual tokens. KiB: whole pages of " + std::to_string(options.page_tokens) +
                                " tokens, text included, as an answer begins; full cache: float.",
                       .value = "right",
                       .shares = true,
                       .panels = {}};
  std::vector<BytesPoint> points;
  double least = 1;
  for (std::size_t i = 0; i < settings.size(); ++i) {
    BytesPoint& point = points.emplace_back(BytesPoint{settings[i].policy, {}, {}});
    for (const Task task : panels) {
      const Score& score = results[i][task];
      point.bytes.push_back(score.answer_bytes());
      point.values.push_back(task == Task::desc ? score.by_token() : score.exact());
      least = std::min(least, point.values.back());
    }
  }
  least = std::max(0.0, std::ceil(10 * least - 1) / 10);  // the axis begins at the tenth below the lowest
  for (const Task task : panels) picture.panels.push_back({panel_title(task), least, 1.02});
  plot_bytes(path, picture, points);
}

void plot_survival(const std::string& path, const Scene& scene, const std::string& title, const std::string& caption,
                   const std::vector<double>& keeps, const std::vector<Survival>& rows) {
  const std::vector<Rgb> heat = heat_colours(keeps.size());
  const double left = 24, top = 104, cell = 190, gap = 14, heading = 34, scale_left = 220, box = 74;
  const double step = cell + gap, row_step = cell + heading;
  const double scale_top = top + row_step * static_cast<double>(rows.size()) + 22;
  const double width =
      std::max(left + step * (1 + layer_count), scale_left + box * static_cast<double>(keeps.size())) + 10;
  Picture picture(path, width, scale_top + 56);
  auto& g = picture.script;
  g << photo_data("$photo", scene, false) << photo_data("$faded", scene, true);

  g << "unset tics\nunset colorbox\nset border 15 lc rgb '#bbbbbb'\nset xrange [0:96]\nset yrange [96:0]\n";
  picture.title(title, caption, left);
  for (Index l = 0; l < layer_count; ++l)
    picture.write("layer " + std::to_string(l), left + step * static_cast<double>(l + 1) + cell / 2, top - 4,
                  "center textcolor rgb '#333333'");
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const double row_top = top + row_step * static_cast<double>(r) + heading - 10;
    picture.write(rows[r].policy, left, row_top - 12, "left font 'Helvetica,14' textcolor rgb '#111111'");
    picture.place(left, row_top, cell, cell);
    picture.plot("$photo with rgbimage");
    for (std::size_t l = 0; l < rows[r].layers.size(); ++l) {
      const std::string data = "$heat" + std::to_string(r) + "_" + std::to_string(l);
      const bool any = std::any_of(rows[r].layers[l].begin(), rows[r].layers[l].end(), [](double s) { return s > 0; });
      g << heat_data(data, rows[r].layers[l], heat);
      picture.place(left + step * static_cast<double>(l + 1), row_top, cell, cell);
      picture.plot(
          "$faded with rgbimage" +
          (any ? ", " + data +
                     " using 1:2:(3.7):(3.7):3 with boxxyerror fill transparent solid 0.75 noborder lc rgb variable"
               : std::string()));
    }
  }

  // The scale: one box per budget.
  g << "unset border\nset xrange [0:" << keeps.size() << "]\nset yrange [0:1]\n$scale << EOD\n";
  for (std::size_t k = 0; k < keeps.size(); ++k)
    g << static_cast<double>(k) + 0.5 << " 0.5 " << heat[k].packed() << '\n';
  g << "EOD\n";
  picture.write("still there when the budget is", left, scale_top + 9, "left textcolor rgb '#333333'");
  for (std::size_t k = 0; k < keeps.size(); ++k)
    picture.write(percent(keeps[k]), scale_left + box * (static_cast<double>(k) + 0.5), scale_top + 32,
                  "center textcolor rgb '#333333'");
  picture.place(scale_left, scale_top, box * static_cast<double>(keeps.size()), 18);
  picture.plot("$scale using 1:2:(0.48):(0.5):3 with boxxyerror fill solid noborder lc rgb variable");
  picture.draw();
}

}  // namespace vlm
