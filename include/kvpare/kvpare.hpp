// Everything that needs no GPU.
#pragma once

#include "backend/cpu/backend.hpp"
#include "cache/engine_pages.hpp"
#include "cache/page_pool.hpp"
#include "codec/group.hpp"
#include "codec/raw.hpp"
#include "core/version.hpp"
#include "pipeline/engine.hpp"
#include "pipeline/kv_cache.hpp"
#include "runtime/make_compressor.hpp"
#include "runtime/snapshot.hpp"
