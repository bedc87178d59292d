# One executable per tests/*_test.cpp, and the installed package used from outside.
# SPDX-License-Identifier: Apache-2.0
find_package(GTest QUIET)
if(NOT GTest_FOUND)
  include(FetchContent)
  set(INSTALL_GTEST OFF CACHE BOOL "" FORCE)
  FetchContent_Declare(googletest
                       URL https://github.com/google/googletest/releases/download/v1.15.2/googletest-1.15.2.tar.gz)
  FetchContent_MakeAvailable(googletest)
endif()
include(GoogleTest)

file(GLOB tests CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/tests/*_test.cpp)
foreach(source IN LISTS tests)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE tconv_bench tconv_options GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE TCONV_TESTS_DIR="${PROJECT_SOURCE_DIR}/tests" TCONV_CXX="${CMAKE_CXX_COMPILER}")
  gtest_discover_tests(${name} DISCOVERY_MODE PRE_TEST PROPERTIES TIMEOUT 600)
endforeach()

if(TCONV_TOOLS)
  add_test(NAME tool_plan COMMAND tconv_tool plan "2d c6>8 i5x7 t3 s2 p1 | bias gelu")
  set_tests_properties(tool_plan PROPERTIES PASS_REGULAR_EXPRESSION "chosen  [a-z0-9_]+:")
  add_test(NAME tool_check COMMAND tconv_tool check --device cpu --seed 1 "2d c6>8 i5x7 t3 s2 p1 | bias gelu")
  add_test(NAME tool_time COMMAND tconv_tool time --runs 3 "2d c6>8 i5x7 t3 s2 p1 | bias gelu group_norm(2,affine)")
  set_tests_properties(tool_time PROPERTIES PASS_REGULAR_EXPRESSION "c6>8 i5x7")
  add_test(NAME tool_refuses COMMAND tconv_tool plan "2d c6>8 i5x7 t3 s0")
  set_tests_properties(tool_refuses PROPERTIES PASS_REGULAR_EXPRESSION "stride must be greater than zero")
endif()

if(TCONV_TOP_LEVEL AND NOT TCONV_SANITIZE)
  add_test(NAME install_and_find_package
           COMMAND ${CMAKE_COMMAND} -DBUILD_DIR=${PROJECT_BINARY_DIR} -DSOURCE_DIR=${PROJECT_SOURCE_DIR}/examples/cpp
                   -DWORK_DIR=${PROJECT_BINARY_DIR}/find_package_test -DGENERATOR=${CMAKE_GENERATOR}
                   -DCXX=${CMAKE_CXX_COMPILER} -P ${PROJECT_SOURCE_DIR}/cmake/find_package_test.cmake)
endif()
