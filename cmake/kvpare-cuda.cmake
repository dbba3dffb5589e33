# The target kvpare::cuda: the library with its CUDA backend, <kvpare/cuda.cuh>, for .cu files. There where the CUDA Toolkit
# is found, also from an installed package.
if(NOT TARGET kvpare::cuda)
  find_package(CUDAToolkit 12.4 QUIET)
  if(CUDAToolkit_FOUND)
    add_library(kvpare::cuda INTERFACE IMPORTED GLOBAL)
    target_link_libraries(kvpare::cuda INTERFACE kvpare::kvpare CUDA::cudart)
    # The C++ setting does not carry over. CMake 3.25 does not know that nvcc has C++20.
    if(CMAKE_VERSION VERSION_LESS 3.26)
      target_compile_options(kvpare::cuda INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
    else()
      target_compile_features(kvpare::cuda INTERFACE cuda_std_20)
    endif()
    # constexpr functions of the standard library (std::min, std::span's) in kernels. 20012: Eigen's annotations on
    # defaulted functions.
    target_compile_options(kvpare::cuda INTERFACE
      "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:--expt-relaxed-constexpr -diag-suppress 20012>")
  endif()
endif()
