// ggml's decode attention at the shapes of attend_forms: flash attention over one type, and the graph without it over f16.
// A program of its own, kvpare_bench_ggml, built where ggml is installed (find_package(ggml)).
#include <ggml-cpu.h>
#include <ggml.h>

#include <cstring>

#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

enum class Graph { flash, no_flash };

/// One layer's graph over its own K and V, in as many layers as the rotation takes.
class GgmlLayers {
 public:
  GgmlLayers(const LayerShape& shape, Index tokens, ggml_type type, Graph graph, int threads) : threads_(threads) {
    const auto row = static_cast<Index>(ggml_row_size(type, shape.key_dim));
    layer_bytes_ = 2 * tokens * shape.kv_heads * row;
    layers_ = std::max<Index>(2, kvpare::ceil_div(rotation_bytes(), layer_bytes_));
    const auto rows = random_rows<float>(64, 1, shape.key_dim);
    const auto queries = random_rows<float>(shape.q_heads, 1, shape.key_dim, 2);
    for (Index l = 0; l < layers_; ++l) {
      ggml_context* context = ggml_init(
          {.mem_size = static_cast<std::size_t>(layer_bytes_ + 8 * tokens * shape.q_heads + (Index{4} << 20)),
           .mem_buffer = nullptr, .no_alloc = false});
      contexts_.push_back(context);
      ggml_tensor* q = ggml_new_tensor_3d(context, GGML_TYPE_F32, shape.key_dim, 1, shape.q_heads);
      ggml_tensor* k = ggml_new_tensor_3d(context, type, shape.key_dim, tokens, shape.kv_heads);
      std::memcpy(q->data, queries.data(), queries.size() * 4);
      ggml_tensor* out;
      if (graph == Graph::flash) {
        ggml_tensor* v = ggml_new_tensor_3d(context, type, shape.value_dim, tokens, shape.kv_heads);
        fill(k, rows, shape.key_dim), fill(v, rows, shape.key_dim);
        out = ggml_flash_attn_ext(context, q, k, v, nullptr, shape.scale, 0, 0);
      } else {
        ggml_tensor* v = ggml_new_tensor_3d(context, type, tokens, shape.value_dim, shape.kv_heads);  // transposed
        fill(k, rows, shape.key_dim), fill(v, rows, tokens);
        ggml_tensor* p = ggml_soft_max_ext(context, ggml_mul_mat(context, k, q), nullptr, shape.scale, 0);
        out = ggml_mul_mat(context, v, p);
      }
      ggml_cgraph* made = ggml_new_graph(context);
      ggml_build_forward_expand(made, out);
      graphs_.push_back(made);
    }
    plan_ = ggml_graph_plan(graphs_[0], threads_, nullptr);
    work_.resize(plan_.work_size + 64);
    plan_.work_data = work_.data();
  }
  GgmlLayers(const GgmlLayers&) = delete;
  GgmlLayers& operator=(const GgmlLayers&) = delete;
  ~GgmlLayers() {
    for (ggml_context* c : contexts_) ggml_free(c);
  }

  void step(Index i) {
    kvpare::require(ggml_graph_compute(graphs_[static_cast<std::size_t>(i % layers_)], &plan_) == GGML_STATUS_SUCCESS,
                    "ggml: compute failed");
  }
  Index layer_bytes() const { return layer_bytes_; }

 private:
  static void fill(ggml_tensor* to, const std::vector<float>& rows, Index width) {
    const Index count = ggml_nelements(to) / width, known = static_cast<Index>(rows.size());
    std::vector<float> row(static_cast<std::size_t>(width));
    const auto bytes = static_cast<Index>(ggml_row_size(to->type, width));
    for (Index r = 0; r < count; ++r) {
      for (Index c = 0; c < width; ++c) row[static_cast<std::size_t>(c)] = rows[static_cast<std::size_t>((r * width + c) % known)];
      ggml_quantize_chunk(to->type, row.data(), static_cast<char*>(to->data) + r * bytes, 0, 1, width, nullptr);
    }
  }

  int threads_;
  Index layer_bytes_ = 0, layers_ = 0;
  std::vector<ggml_context*> contexts_;
  std::vector<ggml_cgraph*> graphs_;
  ggml_cplan plan_;
  std::vector<std::uint8_t> work_;
};

const bool added = [] {
  ggml_cpu_init();
  const struct {
    const char* name;
    ggml_type type;
    Graph graph;
  } kinds[] = {{"flash_q8_0", GGML_TYPE_Q8_0, Graph::flash},
               {"flash_q4_0", GGML_TYPE_Q4_0, Graph::flash},
               {"flash_f16", GGML_TYPE_F16, Graph::flash},
               {"no_flash_f16", GGML_TYPE_F16, Graph::no_flash}};
  for (const LayerShape& shape : {llama_8b(), qwen_vl_7b()})
    for (const Index tokens : {1024, 4096, 16384})
      for (const auto& kind : kinds) {
        const std::string text = kvpare::message("ggml/", kind.name, "/Q:", shape.q_heads, "/H:", shape.kv_heads, "/D:",
                                                 shape.key_dim, "/N:", tokens, "/threads:1");
        add(text, [=](benchmark::State& state) {
          auto& layers = kept(text, [&] { return std::make_unique<GgmlLayers>(shape, tokens, kind.type, kind.graph, 1); });
          const double bytes = static_cast<double>(layers.layer_bytes());
          run(state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, 1)}},
              [&](Index i) { layers.step(i); });
        });
      }
  return true;
}();

}  // namespace
}  // namespace bench
