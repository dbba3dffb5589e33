// Precisions whose forms are no plain group quantisation: narrower keys, spectra, widths of their own for every token, dictionaries,
// learned codebooks. What each form stores is said at its codec.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>

#include "recipes.hpp"

namespace kvpare {

/// ThinK: old keys without the channels that recent queries hardly look at; what is left of them in any form.
///
/// Source     Xu et al. 2024, "ThinK", arXiv 2407.21018. Channels are chosen once, when the first keys change (Thin's state)
/// Deviation  keys of later tokens lose these channels as well once they are old enough, as in the paper's combination with
///            KIVI; its code beside eviction methods leaves them whole
struct Think {
  static constexpr std::string_view name = "think", base = "full";
  Index percent = 40;         // channels that go
  Index align = 1;            // those that stay are rounded up to a multiple of it
  CodecName keys{"as_appended"};  // what the channels that stay are stored as
  CodecName values{"as_appended"};
  Index recent = 32;  // newest tokens as appended
  Index flush = 1;    // tokens that change together; KIVI's residual, for keys along tokens

  static constexpr auto fields() {
    return std::tuple{
        Field<Think, Index>{"percent", &Think::percent, 1, 90, "channels of keys that go, in percent"},
        Field<Think, Index>{"align", &Think::align, 1, 64, "channels that stay are rounded up to a multiple of it"},
        Choice{"keys", &Think::keys, "codec of the channels that stay"},
        Choice{"values", &Think::values, "codec of the values"},
        Field<Think, Index>{"recent", &Think::recent, 0, 1 << 20, "newest tokens that stay as appended"},
        Field<Think, Index>{"flush", &Think::flush, 1, 1 << 20, "tokens that change together"}};
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    p.kept = {message("thin", percent, align > 1 ? message("a", align) : std::string(), '_', keys.text), values.text};
    p.keep_raw_keys = p.keep_raw_values = recent;
    p.flush_keys = p.flush_values = flush;
    return p;
  }
  friend bool operator==(const Think&, const Think&) = default;
};

/// What a single bit of VidKV's spectrum stands for; see VidKvKeys.
enum class OneBitDecode : std::uint8_t { symmetric, literal };
inline constexpr std::string_view choices(OneBitDecode*) { return "symmetric|literal"; }
/// What the levels of VidKV's values are scaled by: the mean of those that are not 0, or of all.
enum class TernaryScale : std::uint8_t { nonzero_mean, group_mean };
inline constexpr std::string_view choices(TernaryScale*) { return "nonzero_mean|group_mean"; }
/// How QAQ finds the bits for a noise: as printed, or as its code does.
enum class BitsRule : std::uint8_t { paper, reference_code };
inline constexpr std::string_view choices(BitsRule*) { return "paper|reference_code"; }

/// VidKV: wide channels of keys in 2 bits, the spectrum of the others in 1; values in three levels, per channel both.
///
/// Protected  with `protect` tokens that the method keeps have values of 2 bits, and those it would evict three levels: the
///            paper's salient visual tokens, by its cross-modal scores ("cross_modal(keep=0.2) + vid_kv(protect=yes)"), by any
///            other method's, or by Tags where the caller says so
/// Source     Tao et al. 2025, "Plug-and-Play 1.x-Bit KV Cache Quantization for Video LLMs", arXiv 2503.16257
/// Deviation  keys and values leave together, by whole pages, so that up to a page more than `residual` stays as appended;
///            text has no form of its own, as in the paper
struct VidKv {
  static constexpr std::string_view name = "vid_kv", base = "full";
  Index percent = 50;    // channels of keys with 2 bits: 75, 50 or 25
  Index group = 32;      // tokens that share a scale
  Index gamma = 70;      // percent of the mean below which a value is 0; 50 in the code
  Index residual = 128;  // tokens that change together
  OneBitDecode one_bit_decode = OneBitDecode::symmetric;
  TernaryScale ternary_scale = TernaryScale::nonzero_mean;
  bool protect = false;

  static constexpr auto fields() {
    return std::tuple{
        Field<VidKv, Index>{"percent", &VidKv::percent, 25, 75, "channels of keys with 2 bits, in percent: 75, 50 or 25"},
        Field<VidKv, Index>{"group", &VidKv::group, 0, 64, "tokens that share a scale; 0 = the page"},
        Field<VidKv, Index>{"gamma", &VidKv::gamma, 0, 200, "values below so many percent of their mean are 0"},
        Field<VidKv, Index>{"residual", &VidKv::residual, 1, 1 << 20, "tokens that change together"},
        Choice{"one_bit_decode", &VidKv::one_bit_decode, "single bits stand for -s and s, or as printed for 0 and s"},
        Choice{"ternary_scale", &VidKv::ternary_scale, "values are scaled by the mean of those that are not 0, or of all"},
        Choice{"protect", &VidKv::protect, "the method's tokens keep 2 bits in their values"}};
  }
  void check() const {
    require(percent == 75 || percent == 50 || percent == 25, name, ".percent = ", percent, ", must be 75, 50 or 25");
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    const std::string size = group > 0 ? message("_g", group) : std::string();
    const std::string keys = message("vid_kv", percent, size, one_bit_decode == OneBitDecode::literal ? "_literal" : "");
    const std::string values = message("ternary_channel", size, ternary_scale == TernaryScale::group_mean ? "_mean" : "",
                                       gamma != 70 ? message("_gamma", gamma) : std::string());
    p.kept = {keys, protect ? message("int2_channel", size, "_min") : values};
    if (protect) p.rest = {keys, values};
    p.flush_keys = p.flush_values = p.block = residual;
    return p;
  }
  friend bool operator==(const VidKv&, const VidKv&) = default;
};

/// QAQ: bits for every token by how much noise attention bears there, within pages of one size.
///
/// Targets    sigma_s of attention scores decides the bits of keys, sigma_x of outputs those of values, given the largest recent
///            attention (RecentMaximum, the base method's scorer). 0: no target, the page's bits go where they matter most
/// query_norm the model's 90th percentile of |q|^2; 0 = the mean of the newest observed queries
/// Later      with `recode` every `compress` codes pages anew by the attention that their tokens have received since, so that widths
///            rise and fall. Originals are kept in host memory for that, floats; a snapshot does not hold them
/// Source     Dong et al. 2024, "QAQ", arXiv 2403.04643
/// Deviation  lowered from the originals too, where the paper lowers the codes: of a page's bits one token gets what another gives,
///            which takes an original. A page holds `capacity` bits a number, whatever is asked for: see Qaq. With another base method nothing is known
///            of attention, and values get all the bits there are room for
struct QualityAdaptive {
  static constexpr std::string_view name = "qaq", base = "recent_maximum";
  Index capacity = 3;  // bits a number that a page has room for
  double sigma_s = 0, sigma_x = 0;
  double query_norm = 0;
  Index min_bits = 0, max_bits = 4;  // the paper's grid
  BitsRule bits_rule = BitsRule::paper;
  Index residual = 16;  // newest tokens as appended
  Index sinks = 0;
  bool recode = false;  // widths follow attention at every compress

  static constexpr auto fields() {
    using Q = QualityAdaptive;
    return std::tuple{Field<Q, Index>{"capacity", &Q::capacity, 1, 8, "bits a number that pages have room for"},
                      Field<Q, double>{"sigma_s", &Q::sigma_s, 0.0, 1e6, "noise that attention scores bear; 0 = fill the page"},
                      Field<Q, double>{"sigma_x", &Q::sigma_x, 0.0, 1e6, "noise that outputs bear; 0 = fill the page"},
                      Field<Q, double>{"query_norm", &Q::query_norm, 0.0, 1e9, "squared norm of queries; 0 = as observed"},
                      Field<Q, Index>{"min_bits", &Q::min_bits, 0, 8, "the fewest bits of a token"},
                      Field<Q, Index>{"max_bits", &Q::max_bits, 0, 8, "the most bits of a token"},
                      Choice{"bits_rule", &Q::bits_rule, "bits by the formula as printed, or by that of the code"},
                      Field<Q, Index>{"residual", &Q::residual, 0, 1 << 20, "newest tokens that stay as appended"},
                      Field<Q, Index>{"sinks", &Q::sinks, 0, 1 << 20, "first positions that stay as appended"},
                      Choice{"recode", &Q::recode,
                             "pages are coded anew at every compress, by the attention since, from originals in host memory"}};
  }
  void check() const {
    require(min_bits <= max_bits, name, ".min_bits = ", min_bits, ", must be at most max_bits = ", max_bits);
    require(capacity <= max_bits, name, ".capacity = ", capacity, ", must be at most max_bits = ", max_bits,
            ": no token would fill its share of the page");
    require((sigma_s > 0) == (sigma_x > 0), name, ": sigma_s = ", sigma_s, ", sigma_x = ", sigma_x,
            ", must be given both or neither");
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    const char* rule = bits_rule == BitsRule::reference_code ? "_code" : "";
    p.kept = {message("qaq", capacity, "_keys", rule), message("qaq", capacity, "_values", rule)};
    p.keep_raw_keys = p.keep_raw_values = residual;
    p.sinks = sinks, p.recode = recode;
    for (const double x : {sigma_s, sigma_x, query_norm}) p.numbers.push_back(static_cast<float>(x));
    for (const Index n : {min_bits, max_bits}) p.numbers.push_back(static_cast<float>(n));
    return p;
  }
  friend bool operator==(const QualityAdaptive&, const QualityAdaptive&) = default;
};

/// CSR: rows as a few atoms of a dictionary, keys before RoPE. The dictionary is the caller's, learned once and in memory once for
/// all sequences (`KvCache::share_state`) or a sequence's own (`KvCache::set_state`); or it is made of the prompt, where the
/// codec's name says so (dictionary=online256); or both (n8192_online1024), see Sparse.
///
/// Source     Zhang et al. 2024, "CSR: Achieving 1 Bit Key-Value Cache via Sparse Representation", arXiv 2412.11741
/// Deviation  up to `residual` + `batch` - 1 newest tokens are as appended, where the paper has none: matching pursuit of one
///            token takes longer than a decode step, of `batch` together less than half as long each; with before_rope = no
///            keys are stored as attention reads them, which is faster
struct Csr {
  static constexpr std::string_view name = "csr", base = "full";
  Index nonzeros = 8;             // atoms of a key; of each half of a value half as many
  CodecName dictionary{"n8192"};  // as the codec's name says it
  bool before_rope = true;
  Index residual = 0, batch = 16;

  static constexpr auto fields() {
    return std::tuple{Field<Csr, Index>{"nonzeros", &Csr::nonzeros, 2, 32, "atoms of a row: 4 = 1 bit a number of 128"},
                      Choice{"dictionary", &Csr::dictionary, "size of the dictionary, as in the codec's name"},
                      Choice{"before_rope", &Csr::before_rope, "keys are stored before RoPE"},
                      Field<Csr, Index>{"residual", &Csr::residual, 0, 1 << 20, "newest tokens that stay as appended"},
                      Field<Csr, Index>{"batch", &Csr::batch, 1, 1 << 20, "older tokens that are coded together"}};
  }
  void check() const {
    require(nonzeros % 2 == 0, name, ".nonzeros = ", nonzeros, ", must be even: each half of a value has half as many");
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    p.kept = {message(before_rope ? "unrotated_" : "", "sparse", nonzeros, '_', dictionary.text),
              message("sparse", nonzeros / 2, "_c2_", dictionary.text)};
    p.keep_raw_keys = p.keep_raw_values = residual;
    p.flush_keys = p.flush_values = batch;
    return p;
  }
  friend bool operator==(const Csr&, const Csr&) = default;
};

/// KVQuant: codebooks learned for the keys' channels and for values, one percent of outliers beside them, keys before RoPE, the
/// first token as appended.
///
/// Source     Hooper et al. 2024, "KVQuant", arXiv 2401.18079
/// Deviation  codebooks are learned from the first tokens that change their form where the caller gives none
///            (`KvCache::set_state`), without Fisher information; with before_rope = no keys are stored as attention reads them
struct KvQuant {
  static constexpr std::string_view name = "kv_quant", base = "full";
  Index bits = 3;  // 2, 3 or 4
  bool before_rope = true;
  Index outliers = 1;  // of a token at either end
  Index sinks = 1;     // first positions that stay as appended
  Index residual = 0;

  static constexpr auto fields() {
    return std::tuple{Field<KvQuant, Index>{"bits", &KvQuant::bits, 2, 4, "bits of a code"},
                      Choice{"before_rope", &KvQuant::before_rope, "keys are stored before RoPE"},
                      Field<KvQuant, Index>{"outliers", &KvQuant::outliers, 1, 8, "outliers of a token and head at either end"},
                      Field<KvQuant, Index>{"sinks", &KvQuant::sinks, 0, 1 << 20, "first positions that stay as appended"},
                      Field<KvQuant, Index>{"residual", &KvQuant::residual, 0, 1 << 20, "newest tokens that stay as appended"}};
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    p.kept = {message(before_rope ? "unrotated_" : "", "kv_quant_outliers", outliers, "_nuq", bits),
              message("outliers", outliers, "_nuq", bits, "_range")};
    p.sinks = sinks;
    p.keep_raw_keys = p.keep_raw_values = residual;
    return p;
  }
  friend bool operator==(const KvQuant&, const KvQuant&) = default;
};

static_assert(PrecisionPolicy<Think> && PrecisionPolicy<VidKv> && PrecisionPolicy<QualityAdaptive> && PrecisionPolicy<Csr> &&
              PrecisionPolicy<KvQuant>);

}  // namespace kvpare
