# Runs cmake/gpu.cmake without a GPU: a stub in place of nvidia-smi, of compute-sanitizer and of the programs that it
# runs. Expects it to tell right from wrong, to go on after a failure, and to write its table.
cmake_minimum_required(VERSION 3.25)

function(stub file text)
  file(WRITE ${SCRATCH}/${file} "#!/bin/sh\n${text}\n")
  file(CHMOD ${SCRATCH}/${file} PERMISSIONS OWNER_READ OWNER_WRITE OWNER_EXECUTE)
endfunction()

# A GoogleTest program of two cases with these results.
function(stub_test name first second code)
  stub(bin/test_cuda_${name} "
for a in \"$@\"; do case $a in --gtest_output=json:*) out=\${a#--gtest_output=json:} ;; esac; done
if [ -n \"$out\" ]; then
cat > \"$out\" <<'END'
{\"tests\": 2, \"failures\": ${code}, \"testsuites\": [{\"testsuite\": [
 {\"name\": \"A\", \"status\": \"RUN\", \"result\": \"${first}\"}, {\"name\": \"B\", \"status\": \"RUN\", \"result\": \"${second}\"}]}]}
END
fi
echo ran ${name} >> ${SCRATCH}/ran.txt
[ ${code} = 0 ] && echo '[  PASSED  ] 2 tests.' || echo '[  FAILED  ] Suite/Cuda.B, where TypeParam = X'
exit ${code}")
endfunction()

function(reset)
  file(REMOVE_RECURSE ${SCRATCH})
  stub(nvidia-smi "echo 'Some GPU, 580.1, 9.0, 1000 MiB'")
  stub(compute-sanitizer "
tool=$2
while [ \"\${1#*/bin/}\" = \"$1\" ]; do shift; done
\"$@\"
echo \"========= ERROR SUMMARY: 0 errors, $tool\"")
  stub(bin/kvpare_gpu_probe "echo '{\"copy_bytes_per_second\": 4.1e12}' > $1; echo copy 4100 GB/s")
  foreach(name IN ITEMS rows ranking attend attention_mass mixed)
    stub_test(${name} COMPLETED COMPLETED 0)
  endforeach()
  stub(bin/kvpare_bench_cuda "
for a in \"$@\"; do case $a in --benchmark_out=*) out=\${a#--benchmark_out=} ;; --benchmark_filter=^attend/*half*) rows=1 ;; esac; done
echo ran bench >> ${SCRATCH}/ran.txt
echo \"attend/cuda/half/N:131072 ERROR OCCURRED: 'skipped: needs 1 MiB'\"
if [ -z \"$rows\" ]; then echo '{\"context\": {}, \"benchmarks\": []}' > $out; exit 0; fi
cat > $out <<'END'
{\"context\": {}, \"benchmarks\": [
    {
      \"name\": \"attend/cuda/bfloat16/Q:32/H:8/D:128/B:32/N:4096/iterations:9/manual_time\",
      \"us\": 1.2345678e+02, \"of_copy\": 9.2000000000000004e-01, \"queue_us\": 3.5
    },
    {
      \"name\": \"attend/cuda/half/Q:32/H:8/D:128/B:1/N:4096/iterations:9/manual_time\",
      \"label\": \"generic\",
      \"us\": 8.7500000000000000e+00, \"of_copy\": 4.0e-01, \"queue_us\": 3.5
    },
    {
      \"name\": \"attend/cuda/half/Q:32/H:8/D:128/B:64/N:131072/iterations:9/manual_time\",
      \"error_occurred\": true,
      \"error_message\": \"skipped: needs 1 MiB\"
    }
  ]
}
END")
endfunction()

function(check stages budget)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env KVPARE_GPU_STAGES=${stages} KVPARE_GPU_BUDGET=${budget} CUDAARCHS=
                          ${CMAKE_COMMAND} -D BUILD=${SCRATCH} -D NVIDIA_SMI=${SCRATCH}/nvidia-smi
                          -D NVCC=${SCRATCH}/no-nvcc -D COMPUTE_SANITIZER=${SCRATCH}/compute-sanitizer -P ${GPU_SCRIPT}
                  RESULT_VARIABLE code OUTPUT_VARIABLE said ERROR_VARIABLE said)
  set(code ${code} PARENT_SCOPE)
  set(said "${said}" PARENT_SCOPE)
endfunction()

function(expect_success)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "expected success, got ${code}:\n${said}")
  endif()
endfunction()

function(expect_failure text)
  string(FIND "${said}" "${text}" at)
  if(code EQUAL 0 OR at EQUAL -1)
    message(FATAL_ERROR "expected failure with '${text}', got ${code}:\n${said}")
  endif()
endfunction()

function(expect_in file text)
  file(READ ${SCRATCH}/gpu/${file} content)
  string(FIND "${content}" "${text}" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "expected '${text}' in ${file}, got:\n${content}\n${said}")
  endif()
endfunction()

function(expect_ran name times)
  file(STRINGS ${SCRATCH}/ran.txt lines REGEX "^ran ${name}$")
  list(LENGTH lines count)
  if(NOT count EQUAL times)
    message(FATAL_ERROR "expected ${name} to run ${times} times, not ${count}:\n${said}")
  endif()
endfunction()

set(rest probe,tests,sanitizers,bench)

reset()  # all is well; one bar met, one missed, one case too large, many not measured
check(${rest} 60)
expect_success()
expect_in(gpu.md "Some GPU, driver 580.1")
expect_in(gpu.md "| attend | bfloat16/Q:32/H:8/D:128/B:32/N:4096 | 123.45 | 0.920 | 3.50 | of_copy ≥ 0.90 | met (0.920) |")
expect_in(gpu.md "| attend | half/Q:32/H:8/D:128/B:1/N:4096 generic | 8.75 | 0.400 | 3.50 | us ≤ 8 | missed (8.750) |")
expect_in(gpu.md "| attend | half/Q:32/H:8/D:128/B:64/N:131072 | | | | | skipped: needs 1 MiB |")
expect_in(gpu.md "| quantise and pack | | | | | of_copy ≥ 0.90 | not measured |")
expect_in(gpu.md "| tests | attend | passed | 2 cases")
expect_in(gpu.md "| sanitizers | racecheck rows | passed |")
file(READ ${SCRATCH}/gpu/gpu.json json)
string(JSON us GET "${json}" benchmarks 0 us)
string(JSON copy GET "${json}" probe copy_bytes_per_second)
string(JSON device GET "${json}" device)
if(NOT us MATCHES "^123\\.4567" OR NOT device STREQUAL "Some GPU" OR NOT copy GREATER 4e12)
  message(FATAL_ERROR "gpu.json: ${json}")
endif()

check(${rest} 60)  # what has passed is not run again
expect_success()
expect_ran(attend 5)  # once as a test, once for each sanitizer

reset()
stub(nvidia-smi "exit 9")
check(${rest} 60)
expect_failure("there is no GPU")

reset()  # all skipped is a failure, and keeps nothing else from running
stub_test(attend SKIPPED SKIPPED 0)
check(tests,bench 60)
expect_failure("tests attend (failed)")
expect_in(gpu.md "| tests | attend | failed | all 2 cases were skipped |")
expect_in(gpu.md "| tests | rows | passed | 2 cases")
expect_ran(bench 8)

reset()
stub_test(attend COMPLETED SKIPPED 0)
check(tests 60)
expect_success()
expect_in(gpu.md "| tests | attend | passed | 1 cases in")

reset()  # what needs no device has run
stub_test(attend COMPLETED SKIPPED 0)
file(READ ${SCRATCH}/bin/test_cuda_attend whole)
string(REPLACE "echo ran" "echo 'Cuda: this machine lacks the instruction set, or the device'\necho ran" whole "${whole}")
file(WRITE ${SCRATCH}/bin/test_cuda_attend "${whole}")
check(tests 60)
expect_failure("tests attend (failed)")
expect_in(gpu.md "1 of 2 cases found no device")

reset()
stub_test(attend COMPLETED COMPLETED 1)
check(tests 60)
expect_failure("tests attend (failed)")
expect_in(gpu.md "Suite/Cuda.B")

reset()  # a program that ends without a word
stub(bin/test_cuda_mixed "exit 0")
check(tests 60)
expect_failure("tests mixed (failed)")
expect_in(gpu.md "no case ran")

reset()  # one that is not there
file(REMOVE ${SCRATCH}/bin/test_cuda_rows)
check(sanitizers 60)
expect_failure("sanitizers memcheck rows (failed)")

reset()
stub(compute-sanitizer "echo '========= Invalid __global__ read of size 4'; echo '[  PASSED  ] 2 tests.'
echo '========= ERROR SUMMARY: 1 error'; exit 86")
check(sanitizers 60)
expect_failure("sanitizers memcheck rows (failed)")
expect_in(gpu.md "ERROR SUMMARY: 1 error")

reset()  # cases that a filter does not find
stub(compute-sanitizer "echo '[  PASSED  ] 0 tests.'; exit 0")
check(sanitizers 60)
expect_failure("no case passed")

reset()
file(REMOVE ${SCRATCH}/compute-sanitizer)
check(sanitizers 60)
expect_failure("failed")

reset()  # what a benchmark had written when it was stopped is kept, and the rest is done by the next run
file(READ ${SCRATCH}/bin/kvpare_bench_cuda whole)
string(REPLACE "    {\n      \"name\": \"attend/cuda/half/Q:32/H:8/D:128/B:64" "END\nexec sleep 20\n" cut "${whole}")
file(WRITE ${SCRATCH}/bin/kvpare_bench_cuda "${cut}")
check(bench 2)
expect_failure("bench attend_rows (unfinished)")
expect_in(gpu.md "| 123.45 |")
expect_in(gpu.md "| bench | attend_4bit | unfinished |")
file(WRITE ${SCRATCH}/bin/kvpare_bench_cuda "${whole}")
check(bench 60)
expect_success()
expect_in(gpu.md "skipped: needs 1 MiB")

reset()
file(READ ${SCRATCH}/bin/kvpare_bench_cuda whole)
string(REPLACE "echo ran bench" "echo \"encode ERROR OCCURRED: 'running the kernels: misaligned address'\"\necho ran bench" wrong
       "${whole}")
file(WRITE ${SCRATCH}/bin/kvpare_bench_cuda "${wrong}")
check(bench 60)
expect_failure("misaligned address")
expect_in(gpu.md "| bench | rows | failed |")

reset()
check(tests,baking 60)
expect_failure("there is no stage 'baking'")
file(REMOVE_RECURSE ${SCRATCH})
