# find_package first, FetchContent second: an air-gapped machine sets CMAKE_PREFIX_PATH to a prefix with
# these libraries.
include(FetchContent)

find_package(OpenMP REQUIRED COMPONENTS CXX)

find_package(hwy 1.0.3 CONFIG QUIET)
if(NOT hwy_FOUND)
  set(HWY_ENABLE_TESTS OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_EXAMPLES OFF CACHE BOOL "" FORCE)
  set(HWY_ENABLE_CONTRIB OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(hwy URL https://github.com/google/highway/archive/refs/tags/1.2.0.tar.gz)
  FetchContent_MakeAvailable(hwy)
  if(NOT TARGET hwy::hwy)
    add_library(hwy::hwy ALIAS hwy)
  endif()
endif()

find_package(Eigen3 3.4 CONFIG QUIET)
if(NOT Eigen3_FOUND)
  FetchContent_Declare(eigen URL https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.gz
    SOURCE_SUBDIR cmake)  # headers only: its own build is not wanted
  FetchContent_MakeAvailable(eigen)
  add_library(Eigen3::Eigen INTERFACE IMPORTED)
  target_include_directories(Eigen3::Eigen INTERFACE ${eigen_SOURCE_DIR})
endif()

find_package(nlohmann_json 3.9 CONFIG QUIET)
if(NOT nlohmann_json_FOUND)
  FetchContent_Declare(nlohmann_json URL https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz)
  FetchContent_MakeAvailable(nlohmann_json)
endif()

# Header only: XXH3 checksums.
find_path(QUANTLOOM_XXHASH_INCLUDE_DIR xxhash.h)
if(NOT QUANTLOOM_XXHASH_INCLUDE_DIR)
  FetchContent_Declare(xxhash URL https://github.com/Cyan4973/xxHash/archive/refs/tags/v0.8.2.tar.gz
    SOURCE_SUBDIR cmake_unused)
  FetchContent_MakeAvailable(xxhash)
  set(QUANTLOOM_XXHASH_INCLUDE_DIR ${xxhash_SOURCE_DIR})
endif()
