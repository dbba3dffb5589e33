// Everything but a backend.
#pragma once

#include "cache/engine_pages.hpp"
#include "cache/page_pool.hpp"
#include "codec/folded.hpp"
#include "codec/fp8.hpp"
#include "codec/ggml.hpp"
#include "codec/group.hpp"
#include "codec/raw.hpp"
#include "codec/rotation.hpp"
#include "codec/round_trip.hpp"
#include "codec/ternary.hpp"
#include "codec/turbo_quant.hpp"
#include "core/version.hpp"
#include "pipeline/engine.hpp"
#include "pipeline/kv_cache.hpp"
#include "runtime/make_compressor.hpp"
#include "runtime/snapshot.hpp"
