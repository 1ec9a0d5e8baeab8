# Chooses the CUDA compiler, before enable_language(CUDA), in this order:
#   1. the one named by CMAKE_CUDA_COMPILER or $CUDACXX;
#   2. nvcc on PATH or in the usual system folder, if it is new enough;
#   3. the nvcc of the Python packages `cuda-toolkit[nvcc,cccl,cudart]`.
# Sets JAX_FLASH_CUDA_COMPILER_ERROR to the reason when there is none.

# C++20 device code and the fatbin compression that the build asks for.
set(JAX_FLASH_MINIMUM_CUDA 12.4)
set(JAX_FLASH_CUDA_COMPILER_ERROR "")

if(CMAKE_CUDA_COMPILER OR NOT "$ENV{CUDACXX}" STREQUAL "")
  return()
endif()

find_program(JAX_FLASH_SYSTEM_NVCC nvcc PATHS /usr/local/cuda/bin)
if(JAX_FLASH_SYSTEM_NVCC)
  execute_process(COMMAND "${JAX_FLASH_SYSTEM_NVCC}" --version OUTPUT_VARIABLE _nvcc_version
                  ERROR_QUIET)
  if(_nvcc_version MATCHES "release ([0-9]+\\.[0-9]+)"
     AND CMAKE_MATCH_1 VERSION_GREATER_EQUAL JAX_FLASH_MINIMUM_CUDA)
    set(CMAKE_CUDA_COMPILER "${JAX_FLASH_SYSTEM_NVCC}")
    return()
  endif()
  message(STATUS "Passing over ${JAX_FLASH_SYSTEM_NVCC}: not CUDA ${JAX_FLASH_MINIMUM_CUDA} or newer")
endif()

execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import nvidia.cu13 as m; print(list(m.__path__)[0])"
  OUTPUT_VARIABLE _pip_cuda_root
  ERROR_QUIET
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE _pip_cuda_result)

if(NOT _pip_cuda_result EQUAL 0 OR NOT EXISTS "${_pip_cuda_root}/bin/nvcc")
  set(JAX_FLASH_CUDA_COMPILER_ERROR
      "no CUDA compiler: nvcc ${JAX_FLASH_MINIMUM_CUDA} or newer is neither named by CUDACXX, nor on PATH, nor installed as a Python package (pip install 'cuda-toolkit[nvcc,cccl,cudart]==13.0.*')")
  return()
endif()

# jax[cuda13] brings nvcc without cccl, and its parts need not be of one version.
if(NOT EXISTS "${_pip_cuda_root}/include/cccl/nv/target"
   OR NOT EXISTS "${_pip_cuda_root}/lib/libcudart_static.a")
  set(JAX_FLASH_CUDA_COMPILER_ERROR
      "the CUDA compiler in ${_pip_cuda_root} lacks cccl or cudart (pip install 'cuda-toolkit[nvcc,cccl,cudart]==13.0.*')")
  return()
endif()

set(CMAKE_CUDA_COMPILER "${_pip_cuda_root}/bin/nvcc")
set(CUDAToolkit_ROOT "${_pip_cuda_root}")
# The package has lib/ where nvcc.profile says lib64/, and no unversioned
# libcudart.so, which find_package(CUDAToolkit) insists on.
string(APPEND CMAKE_CUDA_FLAGS_INIT " -L${_pip_cuda_root}/lib")
file(GLOB _pip_cudart LIST_DIRECTORIES false "${_pip_cuda_root}/lib/libcudart.so.*")
list(GET _pip_cudart 0 _pip_cudart)
set(CUDA_CUDART "${_pip_cudart}" CACHE FILEPATH "The CUDA runtime library")
