// The numbers of the model that data/README.md describes.
#pragma once

#include <kvpare/core/config.hpp>

namespace vlm {

using kvpare::Index;
using kvpare::Position;

inline constexpr Index layer_count = 4;
inline constexpr Index model_width = 128;
inline constexpr Index q_heads = 8;
inline constexpr Index kv_heads = 2;
inline constexpr Index head_dim = 32;
inline constexpr Index hidden_width = 352;

inline constexpr Index vocabulary_size = 188;
inline constexpr int begin_of_text = 1;  // <bos>
inline constexpr int end_of_answer = 2;  // <eos>

inline constexpr Index patch_side = 8;  // pixels
inline constexpr Index patches_per_side = 12;
inline constexpr Index visual_tokens = patches_per_side * patches_per_side;
inline constexpr Index image_side = patches_per_side * patch_side;
inline constexpr Index image_bytes = image_side * image_side * 3;  // RGB, rows from the top

// A sequence is <bos>, the image, then text.
inline constexpr Position image_begin = 1;
inline constexpr Position image_end = image_begin + visual_tokens;

}  // namespace vlm
