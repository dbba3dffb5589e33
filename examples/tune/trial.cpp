#include "trial.hpp"

#include <algorithm>
#include <cmath>
#include <kvpare/core/random.hpp>
#include <limits>
#include <numeric>
#include <utility>

namespace tune {

namespace {

/// Box and Muller.
class Normal {
 public:
  explicit Normal(std::uint64_t seed) : seed_(seed) {}
  float next() {
    constexpr double two_pi = 6.283185307179586;
    const double radius = std::sqrt(-2 * std::log(1 - static_cast<double>(kvpare::random_unit(seed_, at_))));
    const double angle = two_pi * static_cast<double>(kvpare::random_unit(seed_, at_ + 1));
    at_ += 2;
    return static_cast<float>(radius * std::cos(angle));
  }

 private:
  std::uint64_t seed_, at_ = 0;
};

/// What a cache that is shown all queries knows of them.
void look_at_queries(HeadData& head) {
  const auto width = static_cast<std::size_t>(head.key_dim);
  head.query_peak.assign(width, 0.0f), head.query_squares.assign(width, 0.0f);
  const Index newest = std::min(kvpare::query_window, head.rows());
  head.query_vectors = newest * head.group;
  const std::size_t old = head.queries.size() - static_cast<std::size_t>(head.query_vectors) * width;
  for (std::size_t i = 0; i < head.queries.size(); ++i) {
    float& peak = head.query_peak[i % width];
    peak = std::max(peak, std::abs(head.queries[i]));
    if (i >= old) head.query_squares[i % width] += head.queries[i] * head.queries[i];
  }
}

std::vector<float> rows_of(const kvpare::ConstTensor& tensor, Index first_row, Index rows, Index head, Index heads) {
  std::vector<float> out;
  for (Index r = first_row; r < first_row + rows; ++r)
    for (Index h = head; h < head + heads; ++h)
      kvpare::with_type(tensor.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* row = static_cast<const T*>(tensor.at(r, h));
        for (Index c = 0; c < tensor.width; ++c) out.push_back(static_cast<float>(row[c]));
      });
  return out;
}

}  // namespace

double snr(const std::vector<float>& exact, const std::vector<float>& coded) {
  double power = 0, error = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double x = static_cast<double>(exact[i]), d = static_cast<double>(coded[i]) - x;
    power += x * x, error += d * d;
  }
  return error > 0 ? 10 * std::log10(power / error) : std::numeric_limits<double>::infinity();
}

kvpare::RoundTripFacts HeadData::facts(kvpare::Side side) const {
  kvpare::RoundTripFacts facts{.positions = positions};
  if (side == kvpare::Side::values) return facts;
  facts.query_peak = query_peak, facts.query_squares = query_squares, facts.query_vectors = query_vectors;
  if (rope) facts.rope = rope->view();
  return facts;
}

Trial::Trial(HeadData data) : data_(std::move(data)), exact_(attend(data_.keys, data_.values)) {}

Trial::Attention Trial::attend(const std::vector<float>& keys, const std::vector<float>& values) const {
  const HeadData& d = data_;
  Attention a;
  a.shares.resize(static_cast<std::size_t>(d.rows() * d.group * d.tokens));
  a.outputs.resize(static_cast<std::size_t>(d.rows() * d.group * d.value_dim));
  for (Index i = 0; i < d.rows() * d.group; ++i) {
    const Index seen = d.sees[static_cast<std::size_t>(i / d.group)];
    float* share = a.shares.data() + i * d.tokens;
    const float* q = d.queries.data() + i * d.key_dim;
    double peak = -std::numeric_limits<double>::infinity(), sum = 0;
    std::vector<double> logits(static_cast<std::size_t>(seen));
    for (Index t = 0; t < seen; ++t) {
      float dot = 0;
      for (Index c = 0; c < d.key_dim; ++c) dot += q[c] * keys[static_cast<std::size_t>(t * d.key_dim + c)];
      logits[static_cast<std::size_t>(t)] = static_cast<double>(d.scale * dot);
      peak = std::max(peak, logits[static_cast<std::size_t>(t)]);
    }
    for (double& x : logits) x = std::exp(x - peak), sum += x;
    std::vector<double> out(static_cast<std::size_t>(d.value_dim));
    for (Index t = 0; t < seen; ++t) {
      const double p = logits[static_cast<std::size_t>(t)] / sum;
      share[t] = static_cast<float>(p);
      for (Index c = 0; c < d.value_dim; ++c)
        out[static_cast<std::size_t>(c)] += p * static_cast<double>(values[static_cast<std::size_t>(t * d.value_dim + c)]);
    }
    for (Index c = 0; c < d.value_dim; ++c)
      a.outputs[static_cast<std::size_t>(i * d.value_dim + c)] = static_cast<float>(out[static_cast<std::size_t>(c)]);
  }
  return a;
}

Difference Trial::compare(const std::vector<float>& keys, const std::vector<float>& values) const {
  const Attention coded = attend(keys, values);
  Difference d;
  d.key_snr = snr(data_.keys, keys), d.value_snr = snr(data_.values, values);
  double power = 0, error = 0, cosines = 0, relative = 0, counted = 0;
  const Index outputs = data_.rows() * data_.group, width = data_.value_dim;
  for (Index i = 0; i < outputs; ++i) {
    double aa = 0, bb = 0, ab = 0;
    for (Index c = 0; c < width; ++c) {
      const auto at = static_cast<std::size_t>(i * width + c);
      const double a = static_cast<double>(exact_.outputs[at]), b = static_cast<double>(coded.outputs[at]);
      aa += a * a, bb += b * b, ab += a * b, error += (a - b) * (a - b);
      d.largest = std::max(d.largest, std::abs(a - b));
      if (a != 0) relative += std::abs((a - b) / a), ++counted;
    }
    power += aa;
    cosines += aa > 0 && bb > 0 ? ab / std::sqrt(aa * bb) : aa == bb ? 1 : 0;
  }
  for (std::size_t i = 0; i < exact_.shares.size(); ++i)
    d.e_a += static_cast<double>(std::abs(exact_.shares[i] - coded.shares[i]));
  double seen = 0;
  for (const Index n : data_.sees) seen += static_cast<double>(n * data_.group);
  d.e_a /= std::max(1.0, seen);
  d.e_o = counted > 0 ? relative / counted : 0;
  d.relative = power > 0 ? std::sqrt(error / power) : 0;
  d.cosine = cosines / static_cast<double>(std::max<Index>(1, outputs));
  d.largest /= power > 0 ? std::sqrt(power / static_cast<double>(outputs * width)) : 1;
  return d;
}

HeadData normal_data(Index tokens, Index width, Index group, Index rows, Index outliers, std::uint64_t seed) {
  HeadData head;
  head.tokens = tokens, head.key_dim = head.value_dim = width, head.group = group;
  head.scale = 1 / std::sqrt(static_cast<float>(width));
  Normal normal(seed);
  for (Index i = 0; i < tokens * width; ++i) {
    const bool large = i % width < outliers * 17 && i % width % 17 == 5;  // spread over the head
    head.keys.push_back(normal.next() * (large ? 20.0f : 1.0f));
  }
  for (Index i = 0; i < tokens * width; ++i) head.values.push_back(normal.next());
  for (Index i = 0; i < rows * group * width; ++i) head.queries.push_back(normal.next());
  head.sees.assign(static_cast<std::size_t>(rows), tokens);
  head.positions.resize(static_cast<std::size_t>(tokens));
  std::iota(head.positions.begin(), head.positions.end(), 0);
  look_at_queries(head);
  return head;
}

std::vector<std::vector<HeadData>> trace_data(const example::Trace& trace, Index rows) {
  const kvpare::Model model = trace.model();
  const Index first = std::max<Index>(0, trace.tokens() - rows);
  std::vector<std::vector<HeadData>> layers;
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    const kvpare::LayerShape& shape = model.layers[l];
    auto& heads = layers.emplace_back();
    for (Index h = 0; h < shape.kv_heads; ++h) {
      HeadData head;
      head.tokens = trace.tokens(), head.key_dim = shape.key_dim, head.value_dim = shape.value_dim;
      head.group = shape.group(), head.scale = shape.scale;
      head.keys = rows_of(trace.layers[l].keys.tensor(), 0, trace.tokens(), h, 1);
      head.values = rows_of(trace.layers[l].values.tensor(), 0, trace.tokens(), h, 1);
      head.queries = rows_of(trace.layers[l].queries.tensor(), first, trace.tokens() - first, h * head.group, head.group);
      for (Index r = first; r < trace.tokens(); ++r) head.sees.push_back(r + 1);
      head.positions = trace.positions;
      if (shape.rope && shape.rope->axes.empty()) head.rope = shape.rope;
      look_at_queries(head);
      heads.push_back(std::move(head));
    }
  }
  return layers;
}

}  // namespace tune
