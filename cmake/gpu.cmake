# All that only a GPU can show, unattended:  cmake -P cmake/gpu.cmake
#
#   build        configures preset `cuda` for the GPU found, builds the probe, tests/cuda and kvpare_bench_cuda
#   probe        what kernels rely on: bandwidth, subnormal operands of mma, rates
#   tests        every program of tests/cuda; one whose cases were all skipped, or that ran none, has failed
#   sanitizers   compute-sanitizer's memcheck, racecheck, synccheck and initcheck over some cases of some programs
#   bench        kvpare_bench_cuda, group by group
#
# Results gather in build/cuda/gpu, from run to run: what has passed and is newer than its program is not run again.
# Every run ends with gpu.json (device, versions, results, counters) and gpu.md (a table beside the bars of
# bench/cuda/bars.cmake) there. A failure keeps nothing else from running; the exit status is that of the whole. To
# start over: remove the folder.
#
# Environment
#   KVPARE_GPU_STAGES=tests,bench    only these stages; all without
#   KVPARE_GPU_BUDGET=<seconds>      for each stage; what it has no time for is left to the next run, which is no success.
#                                    Where a command may take ten minutes: one run with 540 for each stage
#   KVPARE_SOURCES=<folder>          for a machine that is offline: dependencies to build from source, whether installed or
#                                    not, in the subfolders Eigen3, GTest, benchmark and nlohmann_json, each what its
#                                    archive (cmake/dependencies.cmake) holds below its top folder
#   KVPARE_JOBS=<n>                  compilers at once; all cores without
#   CUDAARCHS=<n>                    the architecture; with KVPARE_GPU_STAGES=build no GPU is needed then. The other stages
#                                    need nothing but build/cuda/bin
cmake_minimum_required(VERSION 3.25)
include(${CMAKE_CURRENT_LIST_DIR}/steps.cmake)
include(${KVPARE_SOURCE}/bench/cuda/bars.cmake)

if(NOT BUILD)  # the self-test says
  set(BUILD ${KVPARE_SOURCE}/build/cuda)
endif()
set(GPU ${BUILD}/gpu)
file(MAKE_DIRECTORY ${GPU}/logs ${GPU}/status ${GPU}/tests ${GPU}/bench)

set(all_stages build probe tests sanitizers bench)
string(REGEX REPLACE "[ ,;]+" ";" stages "$ENV{KVPARE_GPU_STAGES}")
if(NOT stages)
  set(stages ${all_stages})
endif()
foreach(stage IN LISTS stages)
  if(NOT stage IN_LIST all_stages)
    kvpare_fail("there is no stage '${stage}'; there are build, probe, tests, sanitizers, bench")
  endif()
endforeach()

set(budget 86400)
if("$ENV{KVPARE_GPU_BUDGET}" MATCHES "^[1-9][0-9]*$")
  set(budget $ENV{KVPARE_GPU_BUDGET})
endif()

# Cases for compute-sanitizer, which makes a program ten to a hundred times as slow: <program>=<filter>.
set(sanitized
    "rows=*.AppendConverts*:*.AppendReads*:*.CompactMovesRowsInOrder:*.GatherDecodesLiveTokensInOrder"
    "ranking=*.EqualScoresKeepTheLowerColumn:*.SortRowsDescendsStably:*.ReduceSummarisesWhatIsANumber"
    "attend=*.GroupsOfQueryHeads:*.LengthsAroundAPage:*.HeadsMayDifferInLengthAndHaveHoles"
    "attention_mass=*.GroupsAndWidths:*.HolesAndRaggedHeads"
    "mixed=*.EveryTokenReadsAsItsCodecSays:*.AttendsToWhatIsRead")
set(sanitizer_tools memcheck racecheck synccheck initcheck)
set(sanitizer_seconds 120)  # for one program

# Benchmarks by group, the most wanted first; `others` are those of no group.
set(bench_groups
    "attend_rows=^attend/cuda/(bfloat16|half)/"
    "attend_4bit=^attend/cuda/(int4|int4_g32|nvfp4)/"
    "attend_8bit=^attend/cuda/(int8|fp8_e4m3|q8_0)/"
    "attend_shapes=^attend_(ragged|mixed|one_long)/"
    "attend_2bit=^attend/cuda/(int2|kivi2|ternary|int1)/"
    "scores=^(select_top|attention_mass)/"
    "rows=^(compact|encode|append|append_steps)/"
    "others=-^(attend|attend_ragged|attend_mixed|attend_one_long|select_top|attention_mass|compact|encode|append|append_steps)/")

# ---- small things

function(json_text out text)
  string(REPLACE "\\" "\\\\" text "${text}")
  string(REPLACE "\"" "\\\"" text "${text}")
  string(REPLACE "\n" "\\n" text "${text}")
  string(REPLACE "\t" " " text "${text}")
  string(REPLACE "\r" "" text "${text}")
  string(ASCII 27 escape)
  string(REPLACE "${escape}" "" text "${text}")
  set(${out} "\"${text}\"" PARENT_SCOPE)
endfunction()

# A number with so many digits behind the point; what has an exponent stays as it is.
function(shortened out number digits)
  if(number MATCHES "^(-?[0-9]+)\\.([0-9]+)$")
    set(whole ${CMAKE_MATCH_1})
    string(SUBSTRING "${CMAKE_MATCH_2}000" 0 ${digits} behind)
    set(number "${whole}.${behind}")
  endif()
  set(${out} "${number}" PARENT_SCOPE)
endfunction()

# Runs a command for at most so many seconds; its output goes into a log. Sets code, said, took, log.
function(gpu_run name seconds)
  string(REGEX REPLACE "[^A-Za-z0-9_.]" "_" file "${name}")
  set(log ${GPU}/logs/${file}.log)
  string(TIMESTAMP begun "%s" UTC)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY ${KVPARE_SOURCE} RESULT_VARIABLE code OUTPUT_VARIABLE said
                  ERROR_VARIABLE said TIMEOUT ${seconds})
  string(TIMESTAMP ended "%s" UTC)
  math(EXPR took "${ended} - ${begun}")
  file(WRITE ${log} "${said}")
  foreach(variable IN ITEMS code said took log)
    set(${variable} "${${variable}}" PARENT_SCOPE)
  endforeach()
endfunction()

# What became of one item: passed, failed, unfinished (no time left), absent (the tool is not there, which is no failure).
function(record stage item result detail)
  string(REGEX REPLACE "[^A-Za-z0-9_.]" "_" file "${stage}.${item}")
  json_text(item_text "${item}")
  json_text(detail_text "${detail}")
  string(TIMESTAMP date UTC)
  file(WRITE ${GPU}/status/${file}.json "{\"stage\": \"${stage}\", \"item\": ${item_text}, \"result\": \"${result}\", \
\"detail\": ${detail_text}, \"date\": \"${date}\"}")
  kvpare_say("${stage}: ${item}: ${result}${detail}")
endfunction()

# Has it passed since its program was built?
function(is_done out stage item program)
  string(REGEX REPLACE "[^A-Za-z0-9_.]" "_" file "${stage}.${item}")
  set(status ${GPU}/status/${file}.json)
  set(${out} OFF PARENT_SCOPE)
  if(EXISTS ${status} AND NOT ${program} IS_NEWER_THAN ${status})
    file(READ ${status} text)
    string(JSON result GET "${text}" result)
    if(result STREQUAL passed)
      set(${out} ON PARENT_SCOPE)
    endif()
  endif()
endfunction()

# Seconds that the stage has left, at most `most`.
function(seconds_left out stage_began most)
  string(TIMESTAMP now "%s" UTC)
  math(EXPR left "${stage_began} + ${budget} - ${now}")
  if(left GREATER most)
    set(left ${most})
  endif()
  set(${out} ${left} PARENT_SCOPE)
endfunction()

# The last lines of a text.
function(tail_of out text)
  string(REGEX REPLACE "\n+$" "" text "${text}")
  string(LENGTH "${text}" length)
  if(length GREATER 600)
    math(EXPR from "${length} - 600")
    string(SUBSTRING "${text}" ${from} -1 text)
  endif()
  set(${out} "${text}" PARENT_SCOPE)
endfunction()

# ---- the GPU

find_program(NVCC nvcc HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
find_program(NVIDIA_SMI nvidia-smi)
find_program(COMPUTE_SANITIZER compute-sanitizer HINTS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin
             /usr/local/cuda/compute-sanitizer)

if(NVCC)  # programs find the runtime of the toolkit that built them
  file(REAL_PATH ${NVCC} toolkit)
  cmake_path(GET toolkit PARENT_PATH toolkit)
  cmake_path(GET toolkit PARENT_PATH toolkit)
  set(ENV{LD_LIBRARY_PATH} "${toolkit}/lib64:${toolkit}/lib:$ENV{LD_LIBRARY_PATH}")
endif()

# From "name, driver, major.minor, memory" in `said`.
macro(kvpare_take_gpu)
  if(code EQUAL 0 AND said MATCHES "^([^\n,]+), *([^\n,]+), *([0-9]+)\\.([0-9]+), *([^\n,]+)")
    set(gpu_name "${CMAKE_MATCH_1}")
    set(gpu_driver "${CMAKE_MATCH_2}")
    set(gpu_arch "${CMAKE_MATCH_3}${CMAKE_MATCH_4}")
    set(gpu_memory "${CMAKE_MATCH_5}")
  endif()
endmacro()

set(gpu_name)
if(NVIDIA_SMI)
  execute_process(COMMAND ${NVIDIA_SMI} --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader
                  RESULT_VARIABLE code OUTPUT_VARIABLE said ERROR_VARIABLE said TIMEOUT 60)
  kvpare_take_gpu()
endif()
if(NOT gpu_name AND NVCC)  # a driver without its tools
  file(WRITE ${GPU}/device.cu "
#include <cstdio>
int main() {
  cudaDeviceProp device = {};
  int driver = 0;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess || cudaDriverGetVersion(&driver) != cudaSuccess) return 1;
  std::printf(\"%s, %d, %d.%d, %zu MiB\", device.name, driver, device.major, device.minor, device.totalGlobalMem >> 20);
}
")
  execute_process(COMMAND ${NVCC} -o ${GPU}/device ${GPU}/device.cu RESULT_VARIABLE code OUTPUT_QUIET ERROR_QUIET)
  set(said)
  if(code EQUAL 0)
    execute_process(COMMAND ${GPU}/device RESULT_VARIABLE code OUTPUT_VARIABLE said TIMEOUT 60)
  endif()
  kvpare_take_gpu()
endif()
if(NOT "$ENV{CUDAARCHS}" STREQUAL "")
  set(gpu_arch $ENV{CUDAARCHS})
endif()
if(gpu_name)
  kvpare_say("GPU: ${gpu_name}, driver ${gpu_driver}, ${gpu_memory}, compute capability ${gpu_arch}")
elseif(NOT (stages STREQUAL build AND gpu_arch))
  kvpare_fail("there is no GPU: neither nvidia-smi nor a CUDA program finds one")
endif()

# ---- build

if(build IN_LIST stages)
  string(TIMESTAMP stage_began "%s" UTC)
  if(NOT NVCC)
    kvpare_fail("while looking for nvcc: not on the PATH, nor in CUDACXX, CUDA_HOME or /usr/local/cuda")
  endif()
  set(settings -DCMAKE_CUDA_COMPILER=${NVCC} -DCUDAToolkit_ROOT=${toolkit} -DCMAKE_CUDA_ARCHITECTURES=${gpu_arch}
      -DKVPARE_BUILD_TESTS=ON -DKVPARE_BUILD_BENCH=ON -DKVPARE_BUILD_EXAMPLES=OFF)
  set(folder "$ENV{KVPARE_SOURCES}")
  if(folder)
    cmake_path(ABSOLUTE_PATH folder BASE_DIRECTORY ${KVPARE_SOURCE})
    get_property(names GLOBAL PROPERTY KVPARE_DEPENDENCIES)
    foreach(name IN LISTS names)
      if(IS_DIRECTORY ${folder}/${name})
        string(TOUPPER ${name} upper)
        list(APPEND settings -DFETCHCONTENT_SOURCE_DIR_${upper}=${folder}/${name}
             -DCMAKE_DISABLE_FIND_PACKAGE_${name}=ON)
      endif()
    endforeach()
  endif()
  set(generator)
  set(keep_going --keep-going)
  find_program(NINJA NAMES ninja ninja-build)
  if(NINJA AND NOT EXISTS ${BUILD}/CMakeCache.txt)
    set(generator -G Ninja -DCMAKE_MAKE_PROGRAM=${NINJA})
  endif()
  kvpare_say("configuring ...")
  gpu_run(configure ${budget} ${CMAKE_COMMAND} --preset cuda -B ${BUILD} ${generator} ${settings})
  if(code MATCHES "timeout")
    record(build configure unfinished " after ${took} s")
  elseif(NOT code EQUAL 0)
    tail_of(last "${said}")
    record(build configure failed ", see ${log}:\n${last}")
  else()
    record(build configure passed " in ${took} s")
    file(STRINGS ${BUILD}/CMakeCache.txt with_ninja REGEX "^CMAKE_GENERATOR:INTERNAL=Ninja")
    if(with_ninja)
      set(keep_going -k 0)
    endif()
    kvpare_say("building ...")
    seconds_left(left ${stage_began} ${budget})
    gpu_run(build ${left} ${CMAKE_COMMAND} --build ${BUILD} --parallel ${jobs} --target kvpare_gpu_probe kvpare_bench_cuda
            kvpare_cuda_tests -- ${keep_going})
    if(code EQUAL 0)
      record(build programs passed " in ${took} s")
    elseif(code MATCHES "timeout")
      record(build programs unfinished " after ${took} s")
    else()
      string(REGEX MATCHALL "[^\n]*error[^\n]*" errors "${said}")
      list(JOIN errors "\n" errors)
      string(SUBSTRING "${errors}" 0 2000 errors)
      record(build programs failed ", see ${log}:\n${errors}")
    endif()
  endif()
endif()

# ---- probe

if(probe IN_LIST stages)
  set(program ${BUILD}/bin/kvpare_gpu_probe)
  if(NOT EXISTS ${program})
    record(probe kvpare_gpu_probe failed ": it is not built")
  else()
    gpu_run(probe 120 ${program} ${GPU}/probe.json)
    tail_of(last "${said}")
    if(code EQUAL 0)
      record(probe kvpare_gpu_probe passed "\n${last}")
    else()
      record(probe kvpare_gpu_probe failed " with ${code}:\n${last}")
    endif()
  endif()
endif()

# ---- tests

# One GoogleTest program: its result and what to say of it.
function(judge_test out_result out_detail json code said took log)
  set(${out_result} failed PARENT_SCOPE)
  if(code MATCHES "timeout")
    set(${out_detail} " after ${took} s: out of time" PARENT_SCOPE)
    return()
  endif()
  set(tests 0)
  set(failures 0)
  set(skipped 0)
  if(EXISTS ${json})
    file(READ ${json} text)
    string(JSON tests ERROR_VARIABLE wrong GET "${text}" tests)
    string(JSON failures ERROR_VARIABLE wrong GET "${text}" failures)
    string(REGEX MATCHALL "\"result\": *\"SKIPPED\"" all "${text}")
    list(LENGTH all skipped)
  endif()
  if(NOT tests MATCHES "^[1-9][0-9]*$")
    tail_of(last "${said}")
    set(${out_detail} ": no case ran (exit status ${code}), see ${log}:\n${last}" PARENT_SCOPE)
    return()
  endif()
  math(EXPR ran "${tests} - ${skipped}")
  set(counts "${ran} cases in ${took} s")
  if(skipped GREATER 0)
    string(APPEND counts ", ${skipped} skipped")
  endif()
  if(ran EQUAL 0)
    set(${out_detail} ": all ${tests} cases were skipped" PARENT_SCOPE)
  elseif(said MATCHES "this machine lacks [^\n]*the device")  # as tests/support/rigs.hpp says
    set(${out_detail} ": ${skipped} of ${tests} cases found no device" PARENT_SCOPE)
  elseif(code EQUAL 0)
    set(${out_result} passed PARENT_SCOPE)
    set(${out_detail} ", ${counts}" PARENT_SCOPE)
  else()
    string(REGEX MATCHALL "\\[  FAILED  \\] [A-Za-z0-9_/.]+[./][A-Za-z0-9_/]+" names "${said}")
    list(TRANSFORM names REPLACE "^\\[  FAILED  \\] " "")
    list(REMOVE_DUPLICATES names)
    list(JOIN names ", " names)
    tail_of(last "${said}")
    if(NOT names)
      set(names "it ended in the middle:\n${last}")
    endif()
    set(${out_detail} " with ${code}, ${counts}, ${failures} failed, see ${log}: ${names}" PARENT_SCOPE)
  endif()
endfunction()

# The programs that should be there: those ctest knows of, else those that are.
function(test_programs out)
  set(names)
  if(EXISTS ${BUILD}/CTestTestfile.cmake)
    execute_process(COMMAND ${CMAKE_CTEST_COMMAND} --test-dir ${BUILD} -N -L "^cuda$" OUTPUT_VARIABLE said ERROR_QUIET)
    string(REGEX MATCHALL "cuda\\.[A-Za-z0-9_]+" names "${said}")
    list(TRANSFORM names REPLACE "^cuda\\." "")
  endif()
  file(GLOB programs RELATIVE ${BUILD}/bin ${BUILD}/bin/test_cuda_*)
  list(TRANSFORM programs REPLACE "^test_cuda_" "")
  list(APPEND names ${programs})
  list(REMOVE_DUPLICATES names)
  list(FILTER names EXCLUDE REGEX "\\.")
  set(${out} ${names} PARENT_SCOPE)
endfunction()

if(tests IN_LIST stages)
  string(TIMESTAMP stage_began "%s" UTC)
  test_programs(names)
  if(NOT names)
    record(tests programs failed ": there are none")
  endif()
  foreach(name IN LISTS names)
    set(program ${BUILD}/bin/test_cuda_${name})
    if(NOT EXISTS ${program})
      record(tests ${name} failed ": it is not built")
      continue()
    endif()
    is_done(done tests ${name} ${program})
    if(done)
      continue()
    endif()
    seconds_left(left ${stage_began} 600)
    if(left LESS 1)
      record(tests ${name} unfinished ": no time left")
      continue()
    endif()
    file(REMOVE ${GPU}/tests/${name}.json)
    gpu_run(test_${name} ${left} ${program} --gtest_output=json:${GPU}/tests/${name}.json --gtest_color=no)
    judge_test(result detail ${GPU}/tests/${name}.json "${code}" "${said}" ${took} ${log})
    if(code MATCHES "timeout" AND left LESS 600)
      set(result unfinished)
    endif()
    record(tests ${name} ${result} "${detail}")
  endforeach()
endif()

# ---- sanitizers

if(sanitizers IN_LIST stages)
  string(TIMESTAMP stage_began "%s" UTC)
  if(NOT COMPUTE_SANITIZER)
    record(sanitizers compute-sanitizer absent ": not on the PATH nor beside nvcc")
  else()
    file(REMOVE ${GPU}/status/sanitizers.compute_sanitizer.json)
    foreach(tool IN LISTS sanitizer_tools)
      foreach(case IN LISTS sanitized)
        string(REGEX MATCH "^([^=]+)=(.*)$" _ "${case}")
        set(name ${CMAKE_MATCH_1})
        set(filter "${CMAKE_MATCH_2}")
        set(item "${tool} ${name}")
        set(program ${BUILD}/bin/test_cuda_${name})
        if(NOT EXISTS ${program})
          record(sanitizers "${item}" failed ": it is not built")
          continue()
        endif()
        is_done(done sanitizers "${item}" ${program})
        if(done)
          continue()
        endif()
        seconds_left(left ${stage_began} ${sanitizer_seconds})
        if(left LESS 1)
          record(sanitizers "${item}" unfinished ": no time left")
          continue()
        endif()
        gpu_run(${tool}_${name} ${left} ${COMPUTE_SANITIZER} --tool ${tool} --error-exitcode 86 --print-limit 20 ${program}
                --gtest_filter=${filter} --gtest_color=no)
        string(REGEX MATCH "(ERROR|RACECHECK) SUMMARY: [^\n]*" summary "${said}")
        if(code MATCHES "timeout")
          if(left EQUAL sanitizer_seconds)
            record(sanitizers "${item}" failed ": not done after ${took} s")
          else()
            record(sanitizers "${item}" unfinished " after ${took} s")
          endif()
        elseif(NOT said MATCHES "\\[  PASSED  \\] [1-9]")
          tail_of(last "${said}")
          record(sanitizers "${item}" failed " with ${code}: no case passed, see ${log}:\n${last}")
        elseif(code EQUAL 0)
          record(sanitizers "${item}" passed " in ${took} s, ${summary}")
        else()
          string(REGEX MATCHALL "========= [^\n]*( at |Error|error|hazard|Race)[^\n]*" finds "${said}")
          list(SUBLIST finds 0 6 finds)
          list(JOIN finds "\n" finds)
          record(sanitizers "${item}" failed " with ${code}, ${summary}, see ${log}:\n${finds}")
        endif()
      endforeach()
    endforeach()
  endif()
endif()

# ---- benchmarks

# Google Benchmark writes as it goes: what was complete when it was stopped is kept.
function(mend_json file)
  if(NOT EXISTS ${file})
    return()
  endif()
  file(READ ${file} text)
  string(JSON count ERROR_VARIABLE wrong LENGTH "${text}" benchmarks)
  if(wrong)
    string(FIND "${text}" "\n    }" last REVERSE)
    if(last EQUAL -1)
      file(REMOVE ${file})
      return()
    endif()
    string(SUBSTRING "${text}" 0 ${last} text)
    file(WRITE ${file} "${text}\n    }\n  ]\n}\n")
  endif()
endfunction()

if(bench IN_LIST stages)
  string(TIMESTAMP stage_began "%s" UTC)
  set(program ${BUILD}/bin/kvpare_bench_cuda)
  if(NOT EXISTS ${program})
    record(bench kvpare_bench_cuda failed ": it is not built")
  else()
    file(REMOVE ${GPU}/status/bench.kvpare_bench_cuda.json)
    foreach(group IN LISTS bench_groups)
      string(REGEX MATCH "^([^=]+)=(.*)$" _ "${group}")
      set(name ${CMAKE_MATCH_1})
      set(filter "${CMAKE_MATCH_2}")
      is_done(done bench ${name} ${program})
      if(done)
        continue()
      endif()
      seconds_left(left ${stage_began} ${budget})
      if(left LESS 1)
        record(bench ${name} unfinished ": no time left")
        continue()
      endif()
      set(file ${GPU}/bench/${name}.json)
      file(REMOVE ${file})
      gpu_run(bench_${name} ${left} ${program} --benchmark_filter=${filter} --benchmark_out=${file}
              --benchmark_out_format=json)
      mend_json(${file})
      string(REGEX MATCHALL "ERROR OCCURRED: '[^\n]*'" errors "${said}")
      list(FILTER errors EXCLUDE REGEX "'skipped: ")
      if(code MATCHES "timeout")
        record(bench ${name} unfinished " after ${took} s")
      elseif(NOT code EQUAL 0)
        tail_of(last "${said}")
        record(bench ${name} failed " with ${code}, see ${log}:\n${last}")
      elseif(errors)
        list(REMOVE_DUPLICATES errors)
        list(JOIN errors "\n" errors)
        record(bench ${name} failed ", see ${log}:\n${errors}")
      elseif(NOT EXISTS ${file} AND NOT name STREQUAL others)
        record(bench ${name} failed ": no benchmark ran, see ${log}")
      else()
        record(bench ${name} passed " in ${took} s")
      endif()
    endforeach()
  endif()
endif()

# ---- what it comes to

set(benchmarks)   # raw objects, a comma between
set(table)
set(bars_seen)
foreach(group IN LISTS bench_groups)
  string(REGEX MATCH "^([^=]+)=" _ "${group}")
  set(file ${GPU}/bench/${CMAKE_MATCH_1}.json)
  if(NOT EXISTS ${file})
    continue()
  endif()
  file(READ ${file} text)
  string(JSON count ERROR_VARIABLE wrong LENGTH "${text}" benchmarks)
  if(wrong OR count EQUAL 0)
    continue()
  endif()
  math(EXPR last "${count} - 1")
  foreach(i RANGE ${last})
    string(JSON one GET "${text}" benchmarks ${i})
    if(benchmarks)
      string(APPEND benchmarks ",\n")
    endif()
    string(APPEND benchmarks "${one}")
    string(JSON name GET "${one}" name)
    string(REGEX REPLACE "/iterations:[0-9]+/manual_time$" "" name "${name}")
    string(REGEX MATCH "^([^/]+)/cuda/(.*)$" _ "${name}")
    set(kernel "${CMAKE_MATCH_1}")
    set(case "${CMAKE_MATCH_2}")
    string(JSON error ERROR_VARIABLE fine GET "${one}" error_message)
    if(NOT fine)
      string(APPEND table "| ${kernel} | ${case} | | | | | ${error} |\n")
      continue()
    endif()
    foreach(counter IN ITEMS us of_copy queue_us)
      string(JSON ${counter} ERROR_VARIABLE none GET "${one}" ${counter})
      if(none)
        set(${counter})
      endif()
    endforeach()
    string(JSON label ERROR_VARIABLE none GET "${one}" label)
    if(none STREQUAL NOTFOUND)
      string(APPEND case " ${label}")
    endif()
    set(bar_text)
    set(result)
    foreach(bar IN LISTS KVPARE_BARS)
      kvpare_bar(${bar})
      if(NOT "${name}" MATCHES "${bar_REGEX}")
        continue()
      endif()
      string(JSON value ERROR_VARIABLE none GET "${one}" ${bar_COUNTER})
      if(none)
        continue()
      endif()
      list(APPEND bars_seen ${bar})
      kvpare_judge(verdict "${value}")
      shortened(short "${value}" 3)
      string(APPEND bar_text "${bar_COUNTER} ${bar_OP} ${bar_MUST} ")
      string(APPEND result "${verdict} (${short}) ")
    endforeach()
    foreach(counter IN ITEMS us queue_us)
      shortened(${counter} "${${counter}}" 2)
    endforeach()
    shortened(of_copy "${of_copy}" 3)
    string(STRIP "${bar_text}" bar_text)
    string(STRIP "${result}" result)
    string(APPEND table "| ${kernel} | ${case} | ${us} | ${of_copy} | ${queue_us} | ${bar_text} | ${result} |\n")
  endforeach()
endforeach()
foreach(bar IN LISTS KVPARE_BARS)
  if(NOT bar IN_LIST bars_seen)
    kvpare_bar(${bar})
    string(APPEND table "| ${bar_TITLE} | | | | | ${bar_COUNTER} ${bar_OP} ${bar_MUST} | not measured |\n")
  endif()
endforeach()

set(results)
set(results_table)
set(bad)
foreach(stage IN LISTS all_stages)
  file(GLOB files ${GPU}/status/${stage}.*.json)
  foreach(file IN LISTS files)
    file(READ ${file} text)
    if(results)
      string(APPEND results ",\n")
    endif()
    string(APPEND results "${text}")
    string(JSON item GET "${text}" item)
    string(JSON result GET "${text}" result)
    string(JSON detail GET "${text}" detail)
    string(REGEX REPLACE "\n.*$" " …" detail "${detail}")
    string(REGEX REPLACE "^[,: ]+" "" detail "${detail}")
    string(APPEND results_table "| ${stage} | ${item} | ${result} | ${detail} |\n")
    if(NOT result MATCHES "^(passed|absent)$")
      list(APPEND bad "${stage} ${item} (${result})")
    endif()
  endforeach()
endforeach()

set(probe_json null)
if(EXISTS ${GPU}/probe.json)
  file(READ ${GPU}/probe.json probe_json)
endif()
set(nvcc_version)
if(NVCC)
  execute_process(COMMAND ${NVCC} --version OUTPUT_VARIABLE said ERROR_QUIET)
  string(REGEX MATCH "V[0-9.]+" nvcc_version "${said}")
endif()
execute_process(COMMAND git -C ${KVPARE_SOURCE} describe --always --dirty OUTPUT_VARIABLE commit ERROR_QUIET
                OUTPUT_STRIP_TRAILING_WHITESPACE)
string(TIMESTAMP date UTC)
foreach(variable IN ITEMS gpu_name gpu_driver gpu_arch gpu_memory nvcc_version commit)
  json_text(${variable}_text "${${variable}}")
endforeach()
set(json "{\"date\": \"${date}\", \"commit\": ${commit_text}, \"device\": ${gpu_name_text}, \"driver\": ${gpu_driver_text},
\"memory\": ${gpu_memory_text}, \"architecture\": ${gpu_arch_text}, \"nvcc\": ${nvcc_version_text}, \"cmake\": \"${CMAKE_VERSION}\",
\"probe\": ${probe_json},
\"results\": [
${results}
],
\"benchmarks\": [
${benchmarks}
]}
")
file(WRITE ${GPU}/gpu.json "${json}")
string(JSON count ERROR_VARIABLE wrong LENGTH "${json}" results)
if(wrong)
  list(APPEND bad "gpu.json (${wrong})")
endif()
file(WRITE ${GPU}/gpu.md "${gpu_name}, driver ${gpu_driver}, nvcc ${nvcc_version}, ${date}, ${commit}

| kernel | case | us | of_copy | queue_us | bar | |
|---|---|---|---|---|---|---|
${table}
| stage | what | result | |
|---|---|---|---|
${results_table}")

kvpare_say("results are in ${GPU}/gpu.json and gpu.md")
if(bad)
  list(JOIN bad ", " bad)
  kvpare_fail("${bad}")
endif()
kvpare_say("all that was asked for has passed")
