// Stands in for the header of the CUDA toolkit.
#pragma once

using cudaStream_t = struct CUstream_st*;
