// Pictures, drawn by gnuplot: a script that is laid out in pixels from the top left.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace example {

/// gnuplot is missing, or did not do what it was asked.
struct PlotError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

bool gnuplot_found();

/// Throws PlotError unless a picture can be drawn into this file: gnuplot is there and the name ends in .svg or .png.
/// Ask before long work.
void check_plot(const std::string& path);

/// A text in gnuplot's single quotes.
std::string quoted(const std::string& text);

/// "10 %", for gnuplot's labels.
std::string percent(double share);

struct Rgb {
  int r, g, b;
  int packed() const { return r << 16 | g << 8 | b; }
  std::string hex() const;
};

inline constexpr Rgb white{255, 255, 255};

Rgb mix(Rgb a, Rgb b, double share_of_b);

/// A gnuplot script, run when it is complete.
class Picture {
 public:
  /// In pixels. The name's end, .svg or .png, chooses the form.
  Picture(std::string path, double width, double height);

  /// Where the next plot goes, its axes and labels not counted.
  void place(double left, double top, double width, double height);

  /// A text that the next plot draws.
  void write(const std::string& text, double x, double y, const char* style);

  /// A heading and what stands below it, at most two lines.
  void title(const std::string& words, const std::string& below, double left);

  void plot(const std::string& what);

  /// Throws PlotError.
  void draw();

  std::ostringstream script;

 private:
  std::string path_;
  double width_, height_;
  int labels_ = 0;
};

}  // namespace example
