// Everything that needs no GPU.
#pragma once

#include "any_backend.hpp"
#include "backend/cpu/backend.hpp"
#include "codec/kv_quant.hpp"
#include "codec/qaq.hpp"
#include "codec/sparse.hpp"
#include "codec/thin.hpp"
#include "codec/unrotated.hpp"
#include "codec/vid_kv.hpp"
#include "compiled.hpp"
