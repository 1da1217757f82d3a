// Stands in for the header of the CUDA toolkit.
#pragma once

#include "emulated_device.hpp"
