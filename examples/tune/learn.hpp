// States of codecs, learnt from the keys and values of recorded prompts: ranges and codebooks, dictionaries.
#pragma once

#include <string>
#include <vector>

#include "support/states.hpp"
#include "support/trace.hpp"

namespace tune {

using kvpare::Index;

struct LearnRules {
  Index share = 1;    // so many layers in a row learn one state; for codecs whose heads share theirs
  Index rounds = 12;  // of learning a dictionary
  Index page_tokens = 64;
};

struct Learnt {
  example::States states;
  /// Layer by layer: power of the numbers over power of their error, in dB, of the prompts that were learnt from.
  std::vector<double> key_snr, value_snr;
};

/// What the codecs learn of a form that a policy gives its tokens, as "kv_quant(bits=3)" or "csr(nonzeros=4,
/// dictionary=n1024)": what they would make of the prompts' rows all together, head by head; of a dictionary that others
/// share, its atoms (learn_dictionary).
///
/// The traces must be of one model. Throws InvalidArgument where they are not, where the policy names no form that these
/// programs list, more than one, one that learns nothing, or one that goes by more of a prompt than the rows it codes (queries, tokens
/// that stay as they are).
Learnt learn_states(const std::string& policy, const std::vector<example::Trace>& traces, const LearnRules& rules);

}  // namespace tune
