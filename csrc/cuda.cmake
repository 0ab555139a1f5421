# libpartita_cuda.so: the device library of real GPUs. PARTITA_CUDA: auto (built when a working nvcc is found), on (an
# error when not), off. The kernel library opens it at run time, so nothing here is needed for a CPU-only build, and a
# CUDA build still runs on a machine that has no driver: the runtime is linked statically and opens the driver itself.
set(PARTITA_CUDA auto CACHE STRING "Build CUDA kernels: auto, on or off")
set_property(CACHE PARTITA_CUDA PROPERTY STRINGS auto on off)
string(TOLOWER "${PARTITA_CUDA}" PARTITA_CUDA_CHOICE)
if(NOT PARTITA_CUDA_CHOICE MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "PARTITA_CUDA: got '${PARTITA_CUDA}', wanted auto, on or off")
endif()
# Machine code only: PTX would be compiled by the driver at the first start. The sm_80 family (mma.sync, cp.async) is
# built for each, kernels that need wgmma or TMA for 90a alone.
set(PARTITA_CUDA_ARCHITECTURES "80-real;89-real;90a-real;120-real" CACHE STRING
    "CUDA architectures, as CMAKE_CUDA_ARCHITECTURES")

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
  if(CUDAToolkit_VERSION VERSION_LESS 12.4)
    message(FATAL_ERROR "CUDA: got toolkit ${CUDAToolkit_VERSION}, wanted 12.4 or later (green contexts)")
  endif()
  # The directory's options are the host compiler's and not nvcc's: these replace them. The resource report of every
  # kernel goes to the build's output, where tools/ptxas_report.py reads it.
  set(PARTITA_NVCC_OPTIONS "-Xcompiler=-Wall,-Wextra,-fvisibility=hidden" -Xptxas=-v --expt-relaxed-constexpr)
  add_library(partita_cuda_family OBJECT ${PARTITA_FAMILY_SOURCES})
  set(PARTITA_CUDA_TARGETS_LIST partita_cuda_family)
  if("${PARTITA_CUDA_ARCHITECTURES}" MATCHES "90a" AND PARTITA_SM90_SOURCES)
    include(csrc/cutlass.cmake)
  endif()
  if("${PARTITA_CUDA_ARCHITECTURES}" MATCHES "90a" AND PARTITA_SM90_SOURCES)
    add_library(partita_cuda_sm90 OBJECT ${PARTITA_SM90_SOURCES})
    target_include_directories(partita_cuda_sm90 SYSTEM PRIVATE ${PARTITA_CUTLASS_INCLUDE})
    set_target_properties(partita_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
    list(APPEND PARTITA_CUDA_TARGETS_LIST partita_cuda_sm90)
  endif()
  foreach(target IN LISTS PARTITA_CUDA_TARGETS_LIST)
    set_target_properties(${target} PROPERTIES COMPILE_OPTIONS "${PARTITA_NVCC_OPTIONS}" CUDA_STANDARD 17
                          CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY None)
    target_include_directories(${target} PRIVATE csrc)
  endforeach()
  string(REPLACE ";" "," PARTITA_CUDA_TARGETS "${PARTITA_CUDA_ARCHITECTURES}")
  file(GLOB PARTITA_CUDA_HOST_SOURCES CONFIGURE_DEPENDS csrc/core/cuda/*.cpp)
  add_library(partita_cuda MODULE csrc/core/kernel_registry.cpp ${PARTITA_CUDA_HOST_SOURCES})
  foreach(target IN LISTS PARTITA_CUDA_TARGETS_LIST)
    target_sources(partita_cuda PRIVATE $<TARGET_OBJECTS:${target}>)
  endforeach()
  set_target_properties(partita_cuda PROPERTIES LINKER_LANGUAGE CXX CXX_VISIBILITY_PRESET hidden)
  target_include_directories(partita_cuda PRIVATE csrc)
  target_compile_definitions(partita_cuda PRIVATE
    "PARTITA_CUDA_TOOLKIT=\"${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}\""
    "PARTITA_CUDA_TARGETS=\"${PARTITA_CUDA_TARGETS}\"")
  target_link_libraries(partita_cuda PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS} Threads::Threads)
  install(TARGETS partita_cuda LIBRARY DESTINATION runtime)
  message(STATUS "CUDA: on (toolkit ${CUDAToolkit_VERSION}, architectures ${PARTITA_CUDA_TARGETS})")
endif()
