// Everything that needs no GPU.
#pragma once

#include "any_backend.hpp"
#include "backend/cpu/backend.hpp"
