// Runs policies on a trace as if it were a prefill, and measures what they keep, what that frees and what it costs.
#pragma once

#include <kvpare/runtime/make_compressor.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "support/states.hpp"
#include "support/trace.hpp"

namespace inspect {

using kvpare::Index;
using kvpare::Position;

struct Options {
  Index page_tokens = 64;
  Index rows = 16;      // the last ones of the trace, whose attention output is compared
  bool scores = false;  // fill in LayerResult::scores
  std::vector<example::States> states = {};  // what codecs have learnt of the model
};

/// How attention outputs differ from those over the full cache.
struct Difference {
  double relative_l2 = 0;  // |out - full| / |full| over all rows, query heads and channels; 0 where both are zero
  double cosine = 1;       // mean over the rows of the cosine between a row's outputs, all its query heads joined
};

/// One layer under one policy.
struct LayerResult {
  Index budget = -1;  // tokens per kv head granted among the policy's classes, the mean where heads share; -1: none
  std::vector<std::vector<Index>> kept;  // [kv head]: indices of tokens in the trace, ascending
  Index page_bytes_before = 0, page_bytes_after = 0;
  Difference difference;
  std::vector<std::vector<float>> scores;  // [kv head][token of the trace]; empty when not asked for or all stay
};

/// What the sequence took: whole pages, and what must be remembered of it.
struct Bytes {
  Index pages = 0;        // whole
  Index live = 0;         // the part of them that live tokens fill
  Index bookkeeping = 0;  // lists of pages, positions, tags
  Index observation = 0;  // scores and queries that wait for the compression
  Index running = 0;      // scores that a policy goes on from at decode
  Index states = 0;       // of codecs: balancers, channel factors
  Index total() const { return pages + bookkeeping + observation + running + states; }
};

/// Tokens that one format of pages holds.
struct FormInUse {
  std::string name;  // of keys/values
  Index tokens = 0;  // over layers and kv heads
  kvpare::Support support = kvpare::Support::fused;  // the least over the layers
};

struct Result {
  std::string policy;  // as the user wrote it
  std::vector<kvpare::SettingText> settings;
  std::vector<LayerResult> layers;
  Difference difference;                      // over all layers
  Index tokens_before = 0, tokens_after = 0;  // over layers and kv heads
  Bytes before, after;                        // right before and right after the compression
  Index bytes_freed = 0;                      // of pages that went back to the pool
  Index nan_scores = 0;                       // tokens that were ranked last for it
  std::vector<FormInUse> forms;               // after the compression, as appended first
  std::vector<std::string> notes;             // what a guard found
};

/// Every format that pages of such a cache can have, and how well attention runs on it. Layers must all have tiles of the
/// first format.
void print_formats(std::ostream& out, const example::Trace& trace, Index page_tokens);

/// What the pages of a cache for this trace hold: the trace's own element type if it has one, else float.
kvpare::DType page_type(const example::Trace& trace);

/// Appends the whole trace, observes all rows, compresses; once per policy, each from the start. Throws InvalidArgument
/// on a policy that is unknown or makes no sense, and on rows < 1; more rows than tokens means all.
std::vector<Result> run(const example::Trace& trace, const std::vector<std::string>& policies, const Options& options);

}  // namespace inspect
