# find_package(quantloom) for other projects: headers, the static library, a CMake package. What a consumer
# links besides (OpenMP, Highway, the CUDA runtime) comes through find_dependency.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/quantloom)
install(DIRECTORY include/quantloom DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development
  FILES_MATCHING PATTERN "*.hpp")
install(TARGETS quantloom EXPORT quantloomTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development)
install(EXPORT quantloomTargets NAMESPACE quantloom:: DESTINATION ${package_dir} COMPONENT development)
configure_package_config_file(cmake/quantloomConfig.cmake.in ${PROJECT_BINARY_DIR}/quantloomConfig.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/quantloomConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/quantloomConfig.cmake ${PROJECT_BINARY_DIR}/quantloomConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT development)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/quantloom COMPONENT development)
