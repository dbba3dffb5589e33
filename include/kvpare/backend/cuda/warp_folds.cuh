// Folds of queries and outputs by a warp: lane l holds channels e * 32 + l as x[e]; what lies beyond D is 0 or unused.
#pragma once

#include "../../codec/folded.hpp"
#include "../../codec/raw.hpp"
#include "../../codec/rotation.hpp"
#include "block.cuh"
#include "tile_layout.cuh"

namespace kvpare::cuda::detail {

template <int D>
inline constexpr int lane_numbers = (D + 31) / 32;
/// Whether a lane's number e is one of the D.
template <int D>
KVPARE_DEVICE bool has_number(int e, int lane) {
  return D % 32 == 0 || e * 32 + lane < D;
}

/// x <- H x / sqrt(n) over blocks of a power of two of channels, the largest first, as kvpare::detail::hadamard_blocks.
template <int D, class Block>
KVPARE_DEVICE void warp_hadamard(Block& b, float (&x)[lane_numbers<D>]) {
  int first = 0;
  KVPARE_DEVICE_UNROLL for (int block = 1024; block >= 32; block /= 2) {
    if (D - first * 32 < block) continue;
    KVPARE_DEVICE_UNROLL for (int e = first; e < first + block / 32; ++e)
      KVPARE_DEVICE_UNROLL for (int mask = 1; mask < 32; mask *= 2) {
        const float other = b.shuffle_xor(x[e], mask);
        x[e] = (b.lane() & mask) != 0 ? other - x[e] : x[e] + other;
      }
    KVPARE_DEVICE_UNROLL for (int stride = 1; stride < block / 32; stride *= 2)
      KVPARE_DEVICE_UNROLL for (int e = 0; e < block / 32; ++e)
        if ((e & stride) == 0) {
          const float low = x[first + e], high = x[first + e + stride];
          x[first + e] = low + high, x[first + e + stride] = low - high;
        }
    const float unit = 1.0f / std::sqrt(static_cast<float>(block));
    KVPARE_DEVICE_UNROLL for (int e = first; e < first + block / 32; ++e) x[e] *= unit;
    first += block / 32;
  }
  if constexpr (D % 32 == 16) {
    float& own = x[D / 32];
    KVPARE_DEVICE_UNROLL for (int mask = 1; mask < 16; mask *= 2) {
      const float other = b.shuffle_xor(own, mask);
      own = (b.lane() & mask) != 0 ? other - own : own + other;
    }
    own *= 0.25f;
  }
}

/// How a codec folds; `known`: whether a warp can do it. D is a multiple of 16.
template <class C, int D>
struct WarpFold {
  static constexpr bool known = GroupCodec<C>;
  template <class Block>
  static KVPARE_DEVICE float query(Block&, const float*, float (&)[lane_numbers<D>]) {
    return 0;
  }
  template <class Block>
  static KVPARE_DEVICE void output(Block&, const float*, float, float (&)[lane_numbers<D>]) {}
};
template <Element T, int D>
struct WarpFold<Raw<T>, D> : WarpFold<void, D> {
  static constexpr bool known = true;
};

template <class Inner, ChannelRule rule, int D>
struct WarpFold<ChannelMap<Inner, rule>, D> {
  using C = ChannelMap<Inner, rule>;
  static constexpr bool known = !is_raw<Inner> && WarpFold<Inner, D>::known;

  /// This lane's share of the bias.
  template <class Block>
  static KVPARE_DEVICE float query(Block& b, const float* state, float (&x)[lane_numbers<D>]) {
    float bias = 0;
    if (state != nullptr)
      KVPARE_DEVICE_UNROLL for (int e = 0; e < lane_numbers<D>; ++e) {
        if (!has_number<D>(e, b.lane())) continue;
        const Channel own(state, e * 32 + b.lane());
        bias += C::fold_query(1, own.numbers, &x[e]);
      }
    return bias + WarpFold<Inner, D>::query(b, C::inner_state(D, state), x);
  }
  template <class Block>
  static KVPARE_DEVICE void output(Block& b, const float* state, float sum, float (&x)[lane_numbers<D>]) {
    WarpFold<Inner, D>::output(b, C::inner_state(D, state), sum, x);
    if (state == nullptr) return;
    KVPARE_DEVICE_UNROLL for (int e = 0; e < lane_numbers<D>; ++e) {
      if (!has_number<D>(e, b.lane())) continue;
      const Channel own(state, e * 32 + b.lane());
      C::fold_output(1, own.numbers, sum, &x[e]);
    }
  }

 private:
  struct Channel {  // the state of a head of one channel
    float numbers[2];
    KVPARE_DEVICE Channel(const float* state, int c)
        : numbers{state[c], C::own_state_floats(1) == 2 ? state[C::own_state_floats(D) - D + c] : 0.0f} {}
  };
};

template <class Inner, std::uint64_t seed, int D>
struct WarpFold<Rotated<Inner, seed>, D> {
  using C = Rotated<Inner, seed>;
  static constexpr bool known = !is_raw<Inner> && WarpFold<Inner, D>::known;

  template <class Block>
  static KVPARE_DEVICE float query(Block& b, const float* state, float (&x)[lane_numbers<D>]) {
    turn(b, x);
    warp_hadamard<D>(b, x);
    return WarpFold<Inner, D>::query(b, C::inner_state(D, state), x);
  }
  template <class Block>
  static KVPARE_DEVICE void output(Block& b, const float* state, float sum, float (&x)[lane_numbers<D>]) {
    WarpFold<Inner, D>::output(b, C::inner_state(D, state), sum, x);
    warp_hadamard<D>(b, x);
    turn(b, x);
  }

 private:
  template <class Block>
  static KVPARE_DEVICE void turn(Block& b, float (&x)[lane_numbers<D>]) {
    if constexpr (seed != 0)
      KVPARE_DEVICE_UNROLL for (int e = 0; e < lane_numbers<D>; ++e)
        x[e] *= kvpare::detail::channel_sign<seed>(e * 32 + b.lane());
  }
};

}  // namespace kvpare::cuda::detail
