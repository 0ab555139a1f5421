# The CUDA half of the kernel library. PARTITA_CUDA: auto (built when a working nvcc is found), on (an error when not),
# off. Nothing here is needed for a CPU-only build, and a CUDA build still runs on a machine that has no driver: the
# runtime is linked statically and opens the driver on the first call.
set(PARTITA_CUDA auto CACHE STRING "Build CUDA kernels: auto, on or off")
set_property(CACHE PARTITA_CUDA PROPERTY STRINGS auto on off)
string(TOLOWER "${PARTITA_CUDA}" PARTITA_CUDA_CHOICE)
if(NOT PARTITA_CUDA_CHOICE MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "PARTITA_CUDA: got '${PARTITA_CUDA}', wanted auto, on or off")
endif()
# compute_80 as PTX runs on everything from Ampere on; sm_90a is what wgmma and TMA need.
set(PARTITA_CUDA_ARCHITECTURES "80-virtual;90a-real" CACHE STRING "CUDA architectures, as CMAKE_CUDA_ARCHITECTURES")

target_link_libraries(partita_kernels PRIVATE ${CMAKE_DL_LIBS})  # core/cuda_status.cpp opens the driver

set(PARTITA_CUDA_FOUND FALSE)
if(PARTITA_CUDA_CHOICE STREQUAL "off")
  message(STATUS "CUDA: off (PARTITA_CUDA=off)")
else()
  # check_language compiles a test program, so a toolkit that does not work with this compiler falls out here.
  find_program(PARTITA_NVCC NAMES nvcc HINTS ENV CUDACXX ENV CUDA_PATH ENV CUDA_HOME PATHS /usr/local/cuda
               PATH_SUFFIXES bin)
  if(PARTITA_NVCC)
    if(NOT CMAKE_CUDA_COMPILER)
      set(CMAKE_CUDA_COMPILER "${PARTITA_NVCC}")
    endif()
    set(CMAKE_CUDA_ARCHITECTURES ${PARTITA_CUDA_ARCHITECTURES})
    include(CheckLanguage)
    check_language(CUDA)
  endif()
  if(PARTITA_NVCC AND CMAKE_CUDA_COMPILER)
    set(PARTITA_CUDA_FOUND TRUE)
  elseif(PARTITA_CUDA_CHOICE STREQUAL "on")
    message(FATAL_ERROR "CUDA: PARTITA_CUDA=on, but no working nvcc was found (set CUDACXX, or PARTITA_CUDA=off)")
  else()
    message(STATUS "CUDA: off (no working nvcc was found; PARTITA_CUDA=on makes that an error)")
  endif()
endif()

if(PARTITA_CUDA_FOUND)
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  file(GLOB PARTITA_CUDA_SOURCES CONFIGURE_DEPENDS csrc/*/cuda/*.cu)
  add_library(partita_cuda OBJECT ${PARTITA_CUDA_SOURCES})
  # Replaces the directory's options, which are the host compiler's and not nvcc's.
  set_target_properties(partita_cuda PROPERTIES COMPILE_OPTIONS "-Xcompiler=-Wall;-Xcompiler=-Wextra"
                        CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY None)
  target_include_directories(partita_cuda PRIVATE csrc)
  target_sources(partita_kernels PRIVATE $<TARGET_OBJECTS:partita_cuda>)
  set_target_properties(partita_kernels PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(partita_kernels PRIVATE CUDA::cudart_static)
  string(REPLACE ";" "," PARTITA_CUDA_TARGETS "${PARTITA_CUDA_ARCHITECTURES}")
  file(GLOB PARTITA_CUDA_HOST_SOURCES CONFIGURE_DEPENDS csrc/*/*_cuda.cpp csrc/core/cuda_status.cpp)
  set_property(SOURCE ${PARTITA_CUDA_HOST_SOURCES} APPEND PROPERTY COMPILE_DEFINITIONS PARTITA_WITH_CUDA
               "PARTITA_CUDA_TOOLKIT=\"${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}\""
               "PARTITA_CUDA_TARGETS=\"${PARTITA_CUDA_TARGETS}\"")
  message(STATUS "CUDA: on (toolkit ${CUDAToolkit_VERSION}, architectures ${PARTITA_CUDA_TARGETS})")
endif()
