// The settings of run-time dispatch, which all folders share.
#pragma once

#include "simd_targets.hpp"
