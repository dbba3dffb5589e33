# Configures, builds and runs all tests:  cmake -P cmake/test.cmake
# steps.cmake says how missing dependencies are found, and which environment variables are read.
cmake_minimum_required(VERSION 3.25)
include(${CMAKE_CURRENT_LIST_DIR}/steps.cmake)

kvpare_prepare(test)
# Benchmarks take minutes to compile and prove nothing here: bench/README.md says how to build them.
kvpare_configure(KVPARE_BUILD_TESTS=ON KVPARE_BUILD_BENCH=OFF KVPARE_BUILD_EXAMPLES=ON)
kvpare_build(all)
kvpare_run("running the tests" ${CMAKE_CTEST_COMMAND} --test-dir ${KVPARE_BUILD} --output-on-failure --no-tests=error
           --parallel ${jobs})

# One entry of ctest may be a program with many cases; its log has them all.
set(ctest_log ${KVPARE_BUILD}/Testing/Temporary/LastTest.log)
file(STRINGS ${ctest_log} lines REGEX "^\\[  PASSED  \\] [0-9]+ test")
set(cases 0)
foreach(line IN LISTS lines)
  string(REGEX MATCH "[0-9]+ test" count "${line}")
  string(REPLACE " test" "" count "${count}")
  math(EXPR cases "${cases} + ${count}")
endforeach()

if(NOT kvpare_said MATCHES "([0-9]+) tests failed out of ([0-9]+)")
  kvpare_fail("while running the tests, see ${kvpare_log}")
elseif(NOT kvpare_code EQUAL 0)
  kvpare_fail("${CMAKE_MATCH_1} of ${CMAKE_MATCH_2} tests, see ${ctest_log}")
endif()
kvpare_say("all ${CMAKE_MATCH_2} tests passed (${cases} cases in GoogleTest programs)")
