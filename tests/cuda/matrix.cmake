# The compile matrix, where there is an nvcc: for sm_90 the kernels of one pair of formats per family and those of policies, each
# held to its budget. Target kvpare_cuda_matrix, part of `all`. kvpare_cuda_product has all listed formats and all architectures:
# by hand.
set(tuning ${include_dir}/kvpare/backend/cuda/tuning.cuh)
set(kernels ${CMAKE_CURRENT_SOURCE_DIR}/cuda/kernels.cu)
file(GLOB_RECURSE kernel_headers CONFIGURE_DEPENDS ${include_dir}/kvpare/*.cuh ${include_dir}/kvpare/*.hpp)

# kvpare_compile_kernels(<out> <architecture> <formats> [definition...])
function(kvpare_compile_kernels out architecture formats)
  set(definitions ${ARGN})
  list(TRANSFORM definitions PREPEND -D)
  set(file ${CMAKE_CURRENT_BINARY_DIR}/cuda/${formats}_${architecture})
  set(command ${KVPARE_NVCC} -std=c++20 -arch=${architecture} ${kvpare_nvcc_flags} ${kvpare_include_flags}
              -DKVPARE_FORMATS=${formats} ${definitions})
  add_custom_command(OUTPUT ${file}
                     COMMAND ${CMAKE_COMMAND} -D "NVCC=${command}" -D SOURCE=${kernels} -D OUT=${file} -D TUNING=${tuning}
                             -P ${CMAKE_CURRENT_SOURCE_DIR}/cuda/compile.cmake
                     DEPENDS ${kernels} ${kernel_headers} ${CMAKE_CURRENT_SOURCE_DIR}/cuda/compile.cmake
                     COMMENT "Compiling kernels: ${formats} for ${architecture}" VERBATIM)
  set(${out} ${${out}} ${file} PARENT_SCOPE)
endfunction()

set(families raw integers groups floats folded tables blocks)
set(matrix)
kvpare_compile_kernels(matrix sm_90 one_of_each KVPARE_WITH_POLICIES)
add_custom_target(kvpare_cuda_matrix ALL DEPENDS ${matrix})
add_dependencies(kvpare_cuda_matrix kvpare_floors)

set(product ${matrix})
foreach(architecture IN ITEMS sm_80 sm_89 sm_100 sm_120)
  kvpare_compile_kernels(product ${architecture} one_of_each)
endforeach()
foreach(architecture IN ITEMS sm_80 sm_89 sm_90 sm_100 sm_120)
  foreach(family IN LISTS families)
    kvpare_compile_kernels(product ${architecture} ${family})
  endforeach()
endforeach()
add_custom_target(kvpare_cuda_product DEPENDS ${product})
add_dependencies(kvpare_cuda_product kvpare_floors)
