# _ops_cuda: kernels/cuda/*.cu on torch's stable ABI. Needs nvcc, but neither a GPU nor CUDA torch.

file(GLOB DLMS_CUDA_SOURCES CONFIGURE_DEPENDS kernels/cuda/*.cu)
if(DLMS_CUDA STREQUAL "OFF" OR NOT DLMS_CUDA_SOURCES)
  message(STATUS "CUDA operators: off")
  return()
endif()
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(DLMS_CUDA STREQUAL "ON")
    message(FATAL_ERROR "DLMS_CUDA=ON, but CMake finds no CUDA compiler; set CUDACXX, or DLMS_CUDA=OFF")
  endif()
  message(STATUS "CUDA operators: off (no CUDA compiler)")
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES "${DLMS_CUDA_ARCHITECTURES}")
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
message(STATUS "CUDA operators: on, for ${CMAKE_CUDA_ARCHITECTURES}")

# libtorch_cuda.so must be named as needed, and CPU-only torch has none to link to: an empty library of
# that name stands in, at link time only.
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/stub.cpp" "// empty: see cmake/CudaOperators.cmake\n")
add_library(dlms_torch_cuda_stub SHARED "${CMAKE_CURRENT_BINARY_DIR}/stub.cpp")
set_target_properties(dlms_torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stub")

add_library(_ops_cuda MODULE ${DLMS_CUDA_SOURCES})
target_include_directories(_ops_cuda PRIVATE csrc)
target_compile_definitions(_ops_cuda PRIVATE ${DLMS_STABLE_ABI} USE_CUDA)
target_compile_options(_ops_cuda PRIVATE
  # -fmad=false for the same reason as -ffp-contract=off on the CPU.
  --fmad=false --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra
  $<$<BOOL:${DLMS_WERROR}>:-Werror=all-warnings>)
target_link_libraries(_ops_cuda PRIVATE dlms_torch dlms_torch_cuda_stub)
set_target_properties(_ops_cuda PROPERTIES PREFIX "" CUDA_RUNTIME_LIBRARY Static)
install(TARGETS _ops_cuda LIBRARY DESTINATION dlms_engine)
