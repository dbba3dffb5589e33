// Methods of the literature, named after their papers: parts, put together with the papers' defaults.
#pragma once

#include "../policy/budget/as_compressed.hpp"
#include "../policy/budget/density.hpp"
#include "../policy/budget/layer_ratios.hpp"
#include "../policy/budget/prefix.hpp"
#include "../policy/budget/pyramid.hpp"
#include "../policy/budget/strength_skewness.hpp"
#include "../policy/budget/uniform.hpp"
#include "../policy/score/accumulated_attention.hpp"
#include "../policy/score/cross_modal.hpp"
#include "../policy/score/cross_self.hpp"
#include "../policy/score/dynamic_share.hpp"
#include "../policy/score/elite_window.hpp"
#include "../policy/score/expected_attention.hpp"
#include "../policy/score/fixed_point.hpp"
#include "../policy/score/key_diff.hpp"
#include "../policy/score/key_norm.hpp"
#include "../policy/score/lag_kv.hpp"
#include "../policy/score/last_row.hpp"
#include "../policy/score/observation_window.hpp"
#include "../policy/score/post_vision.hpp"
#include "../policy/score/recent_maximum.hpp"
#include "../policy/score/recent_message.hpp"
#include "../policy/score/transport.hpp"
#include "../policy/score/unobserved.hpp"
#include "compressor.hpp"

namespace kvpare {

/// Everything stays: the line to reach.
inline auto full() { return Compressor{Random{}, Uniform{}, TopK{}, Keep::ratio(1)}; }

/// A seeded coin: the line to beat.
inline auto random_choice() { return Compressor{Random{}, Uniform{}, TopK{}, Keep::ratio(0.2)}; }

/// StreamingLLM (arXiv 2309.17453): 4 sinks and the newest. Kept keys keep their positions.
inline auto streaming_llm() { return Compressor{SinksAndRecent{}, Uniform{}, TopK{}, Keep::ratio(0.2)}; }

/// H2O (arXiv 2306.14048), at the end of prefill and at every decode step: half of the budget for the newest, half for the
/// most attended.
inline auto h2o() { return Compressor{AccumulatedAttention{}, Uniform{}, TopK{.recent_share = 0.5}, Keep::ratio(0.2)}; }

/// What QAQ (arXiv 2403.04643) foretells attention by: its precision `qaq` reads these scores; nothing goes unless told.
inline auto recent_maximum() { return Compressor{RecentMaximum{}, Uniform{}, TopK{}, Keep::ratio(1)}; }

/// VidKV's salient visual tokens (arXiv 2503.16257): those that the text's embeddings point to; made for its precision.
inline auto cross_modal() {
  return Compressor{CrossModal{}, Uniform{}, TopK{.among = visual}, Keep::ratio(0.2)};
}

/// SnapKV (arXiv 2404.14469): window 32, average pooling over 5, per kv head.
inline auto snap_kv() { return Compressor{ObservationWindow{}, Uniform{}, TopK{}, Keep::ratio(0.2)}; }

/// TOVA (arXiv 2401.06104): what the newest row attends to least goes, one choice per layer.
inline auto tova() { return Compressor{LastRow{}, Uniform{}, TopK{.heads = SelectHeads::layer}, Keep::ratio(0.2)}; }

/// Short keys stay (Devoto et al., arXiv 2406.11430).
inline auto key_norm() { return Compressor{KeyNorm{}, Uniform{}, TopK{}, Keep::ratio(0.2)}; }

/// KeyDiff (arXiv 2504.15364): keys unlike the others stay.
inline auto key_diff() { return Compressor{KeyDiff{}, Uniform{}, TopK{}, Keep::ratio(0.2)}; }

/// LagKV (arXiv 2504.04704): keys and values unlike those that follow stay; 4 sinks, partitions of 128.
inline auto lag_kv() { return Compressor{LagKv{}, Uniform{}, TopK{}, Keep::ratio(0.2)}; }

/// Expected Attention (arXiv 2510.00636): what queries like those of the prompt would give, times the value's length; 4
/// sinks. With future = 512, which needs LayerShape::rope, at the positions to come as in the paper, else where they stood.
inline auto expected_attention() { return Compressor{ExpectedAttention{}, Uniform{}, TopK{}, Keep::ratio(0.2)}; }

/// PyramidKV (arXiv 2406.02069): SnapKV's scores with window 8 and maximum pooling over 7, less from layer to layer.
/// mode = reference: the released code's whole numbers, above the budget.
inline auto pyramid_kv() {
  return Compressor{ObservationWindow{.window = 8, .pool = 7, .pooling = Pooling::max}, Pyramid{.window = 8}, TopK{},
                    Keep::ratio(0.2)};
}

/// Ada-KV (arXiv 2407.11550): SnapKV's scores with maximum pooling over 7, and a budget that the heads of a layer share.
/// mode = reference: each head's part rounded for itself, as released.
inline auto ada_kv() {
  return Compressor{ObservationWindow{.pool = 7, .pooling = Pooling::max}, Uniform{},
                    TopK{.heads = SelectHeads::shared}, Keep::ratio(0.2)};
}

/// VL-Cache (arXiv 2410.23317): attention of the rows after the image over all tokens, budgets by its density, a tenth of
/// each for the newest tokens. mode = reference: as EffiVLM-Bench has it, sums not mended, one window for all layers.
inline auto vl_cache() {
  return Compressor{PostVision{}, Density{}, TopK{.recent_share = 0.1, .last = 1}, Keep::ratio(0.1)};
}

/// PrefixKV (arXiv 2412.03409): H2O's scores, one choice per layer, the same share of them in every layer. mode =
/// reference: as released, with a search that stops near the budget.
inline auto prefix_kv() {
  return Compressor{AccumulatedAttention{}, Prefix{}, TopK{.heads = SelectHeads::layer, .first = 1, .last = 1},
                    Keep::ratio(0.2)};
}

/// How PrefixKV and Elastic Cache go on at every decode step: each layer at the ratio that compress left it with, by dropping
/// the token 25 before the end of what was kept.
inline auto fixed_point() {
  return Compressor{FixedPoint{}, AsCompressed{}, TopK{.heads = SelectHeads::layer}, Keep::ratio(1)};
}

/// CORM (arXiv 2404.15949): what none of the last 256 rows found important goes, the newest 256 stay; no budget: `keep` is only
/// a bound. At the end of prefill and at every decode step.
inline auto corm() {
  return Compressor{RecentMessage{}, Uniform{}, TopK{.last = 256, .only_positive = true}, Keep::ratio(1)};
}

/// KVCrush (arXiv 2503.00022) on SnapKV: a quarter of the budget stands for what goes. On another method: its own settings with
/// represent = 0.25. mode = reference: these in steps of whole numbers, as in OpenVINO.
inline auto kv_crush() {
  return Compressor{ObservationWindow{}, Uniform{}, TopK{.heads = SelectHeads::layer, .represent = 0.25}, Keep::ratio(0.2)};
}

/// ChunkKV (arXiv 2502.00299): SnapKV's votes without smoothing, chunks of ten neighbours.
inline auto chunk_kv() {
  return Compressor{ObservationWindow{.pool = 1}, Uniform{}, TopK{.heads = SelectHeads::layer, .chunk = 10},
                    Keep::ratio(0.2)};
}

/// Elastic Cache (arXiv 2407.18121): H2O's scores, one choice per layer, what goes is averaged into the nearest that stays.
inline auto elastic_cache() {
  return Compressor{AccumulatedAttention{}, Uniform{},
                    TopK{.heads = SelectHeads::layer, .first = 1, .last = 1, .merge = MergeInto::nearest},
                    Keep::ratio(0.5)};
}

/// CaM (ICML 2024) on H2O: values of what goes are added to those of the next 32 that stay, by a seeded coin, so that what they
/// give the output is expected to be the same. At compress only; go on with `h2o` between decode steps.
inline auto cam() {
  return Compressor{AccumulatedAttention{}, Uniform{}, TopK{.recent_share = 0.5, .merge = MergeInto::values},
                    Keep::ratio(0.2)};
}

/// ZipVL (arXiv 2410.08584v2): the tokens that have 97.5 % of a layer's attention; `keep` is only a bound.
inline auto zip_vl() {
  return Compressor{DynamicShare{}, Uniform{}, TopK{.heads = SelectHeads::layer, .only_positive = true}, Keep::ratio(1)};
}

/// CSP (arXiv 2412.04652): the best by attention within a modality and the best by attention across modalities, half each;
/// the last tenth of the prompt's rows look. Half of the budget is for the newest. mode = reference: as released, what is in
/// both lists leaves room for nobody.
inline auto csp() { return Compressor{CrossSelf{}, Uniform{}, TopK{.recent_share = 0.5}, Keep::ratio(0.2)}; }

/// Ours, and the default: what the last 32 rows of text attend to, the longer its values the more, the largest of three
/// neighbours; layer budgets half even, half by strength and skewness, which a layer's heads share as they need. Each part
/// and number comes of the search that examples/vlm/README.md tells of, on other scenes and texts than those it is
/// reported on.
inline auto pare() {
  return Compressor{ObservationWindow{.pool = 3, .pooling = Pooling::max, .rows = text, .values = 1},
                    StrengthSkewness{.layer_floor = 0.5}, TopK{.heads = SelectHeads::shared, .floor = 0},
                    Keep::ratio(0.2)};
}

/// AirCache (arXiv 2503.23956): elite observation window, strength and skewness budgets, top-k of the visual tokens with
/// one choice per layer.
inline auto air_cache() {
  return Compressor{EliteWindow{}, StrengthSkewness{}, TopK{.among = visual, .heads = SelectHeads::layer},
                    Keep::ratio(0.1)};
}

/// TopV (arXiv 2503.18278): half of the visual tokens, those that supply most of layer 2's visual output, every fourth of the
/// others put back within that half; layers 0 to 2 see all, the others hold the same tokens. Reads features: see
/// KvCache::observe_features. The paper drops the tokens themselves from layer 3 on; an engine that does not saves the
/// memory alone.
inline auto top_v() {
  return Compressor{Transport{}, Uniform{},
                    TopK{.among = visual, .heads = SelectHeads::layer, .skip_layers = 3, .recover = 4},
                    Keep::ratio(0.5)};
}

}  // namespace kvpare
