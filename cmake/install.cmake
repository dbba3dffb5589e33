# Installs the headers and a package that find_package(kvpare 0.1) understands.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/kvpare)
install(TARGETS kvpare EXPORT kvpare-targets INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT kvpare-targets NAMESPACE kvpare:: DESTINATION ${package_dir})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/kvpare DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/kvpare)

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/kvpare-config.cmake.in ${PROJECT_BINARY_DIR}/kvpare-config.cmake
                              INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
# Before 1.0 a new minor version may break what was written against the one before.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/kvpare-config-version.cmake COMPATIBILITY SameMinorVersion
                                 ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/kvpare-config.cmake ${PROJECT_BINARY_DIR}/kvpare-config-version.cmake
              ${CMAKE_CURRENT_LIST_DIR}/kvpare-cuda.cmake
        DESTINATION ${package_dir})
