// What is lost against the bytes in use: eviction, fewer bits, both, and the two under one budget, in one picture.
#pragma once

#include <string>
#include <vector>

namespace example {

/// One policy with one budget.
struct BytesPoint {
  std::string policy;           // as the user wrote it
  std::vector<double> bytes;    // [panel] in use
  std::vector<double> values;   // [panel]
};

struct BytesPanel {
  std::string title;
  double least = 0, most = 1;  // of the axis
};

struct BytesPicture {
  std::string title, below;  // what stands over the picture
  std::string value;         // what the vertical axis shows
  bool shares = false;       // values are shares, shown as percent
  std::vector<BytesPanel> panels;
};

/// A policy without what varies along a line: the value of keep becomes "…"; where it only takes bits, those of bits, form,
/// low, capacity, nonzeros and percent. Throws InvalidArgument.
std::string line_of(const std::string& policy);

/// How a policy saves: by eviction, fewer bits, both, one budget over both; or not at all. Throws InvalidArgument.
enum class Saves { nothing, eviction, bits, both, joint };
Saves saves_by(const std::string& policy);

/// One panel beside the other, bytes on a logarithmic axis. Policies that differ in `line_of` only, or in budget, make a line;
/// lines of one kind (Saves) share a colour. Points that lie beyond a panel's axis are left out. Throws PlotError.
void plot_bytes(const std::string& path, const BytesPicture& picture, const std::vector<BytesPoint>& points);

}  // namespace example
