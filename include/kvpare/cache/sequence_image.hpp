// A sequence as host data: what a snapshot writes, and what a cache makes a sequence of.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "pages.hpp"
#include "plan.hpp"
#include "tags.hpp"

namespace kvpare {

/// Everything a sequence is, but for queries and scores that wait for `compress`. Independent of where pages lie and who
/// shares them: of raw keys and values the rows of live slots only, in order; of coded ones the whole tile, as the codec's
/// canonical bytes.
struct SequenceImage {
  struct Page {
    std::uint16_t format = 0;
    Position first = 0;                   // of slot 0
    std::vector<std::uint16_t> offsets;   // [used] of each slot's position from `first`, ascending from 0
    std::uint64_t live = 0;               // bit s: slot s
    std::uint32_t state = 0;              // 0: none; else 1 + index of the layer's states
    std::vector<std::byte> keys, values;  // rows of live slots, or the tile
    friend bool operator==(const Page&, const Page&) = default;
  };
  struct Head {
    std::vector<Page> pages;
    std::vector<float> running;  // [slots that have one] the running scorer's
    friend bool operator==(const Head&, const Head&) = default;
  };
  struct State {
    std::uint16_t format = 0;
    std::vector<float> values;  // [kv_heads][of keys, of values], then those that all heads share; fewer: the caller's part of one
                                // yet to be made
    friend bool operator==(const State&, const State&) = default;
  };
  struct Layer {
    std::vector<State> states;  // of codecs
    Aging aging;
    std::vector<std::pair<Position, Position>>
        given;  // [begin, end) of all positions ever appended, less truncated ones
    std::vector<Head> heads;
    std::string scorer;      // whose running scores these are; empty = none
    Position last_row = -1;  // the newest query row they count
    Index compressed_to = 0, compressed_from = 0;  // tokens a head kept at the last compress, of so many given
    friend bool operator==(const Layer&, const Layer&) = default;
  };
  Index page_tokens = 0;
  std::vector<TagSpan> tags;
  std::vector<Layer> layers;
  friend bool operator==(const SequenceImage&, const SequenceImage&) = default;
};

}  // namespace kvpare
