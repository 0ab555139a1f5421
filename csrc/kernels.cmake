# The kernel library knows no Python; it can be built and carried alone.
file(GLOB PARTITA_SOURCES CONFIGURE_DEPENDS csrc/core/*.cpp csrc/program/*.cpp csrc/partition/*.cpp csrc/gemm/*.cpp
     csrc/attention/*.cpp csrc/moe/*.cpp csrc/norm/*.cpp csrc/rope/*.cpp csrc/activation/*.cpp csrc/embedding/*.cpp
     csrc/sampling/*.cpp csrc/*/cpu/*.cpp)
list(REMOVE_ITEM PARTITA_SOURCES ${CMAKE_CURRENT_SOURCE_DIR}/csrc/core/kernel_registry.cpp)  # each device library has its own
add_library(partita_kernels SHARED ${PARTITA_SOURCES})
target_include_directories(partita_kernels PUBLIC csrc)
target_link_libraries(partita_kernels PRIVATE Threads::Threads)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  foreach(source IN LISTS PARTITA_SOURCES)
    if(source MATCHES "_avx2\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
    elseif(source MATCHES "_avx512\\.cpp$")
      set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS
        "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-mavx512bf16;-mprefer-vector-width=512")
    endif()
  endforeach()
endif()

target_link_libraries(partita_kernels PRIVATE ${CMAKE_DL_LIBS})  # core/gpu_library.cpp opens the device libraries

# The device libraries: the same kernel sources for real GPUs (nvcc) and for the host (tests).
include(csrc/instances.cmake)
include(csrc/cuda.cmake)
add_subdirectory(csrc/simt)
