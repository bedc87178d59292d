# Headers, library, tool, and the package that find_package(tconv) reads.
# SPDX-License-Identifier: Apache-2.0
include(CMakePackageConfigHelpers)
# A wheel holds the component `python` only; a build that also runs the tests needs the rest for find_package.
if(NOT SKBUILD OR TCONV_TESTS)
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/tconv DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  install(TARGETS tconv EXPORT tconvTargets
          ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
          LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
          RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  if(TCONV_TOOLS)
    install(TARGETS tconv_tool RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  endif()
  set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/tconv)
  install(EXPORT tconvTargets NAMESPACE tconv:: DESTINATION ${package_dir})
  configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/tconvConfig.cmake.in
                                ${PROJECT_BINARY_DIR}/tconvConfig.cmake INSTALL_DESTINATION ${package_dir})
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/tconvConfigVersion.cmake COMPATIBILITY SameMinorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/tconvConfig.cmake ${PROJECT_BINARY_DIR}/tconvConfigVersion.cmake
          DESTINATION ${package_dir})
endif()
