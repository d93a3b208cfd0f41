# Captured runs for C++ programs: find_package(dlms_engine) gives the target dlms::graphs, a static
# library and its headers (#include <dlms/graphs.h>). It needs neither torch nor a CUDA toolkit; the
# driver is found at run time.
#
#   set(dlms_engine_DIR <site-packages>/dlms_engine/cmake)
get_filename_component(_dlms_root "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
find_package(Threads REQUIRED)
if(NOT TARGET dlms::graphs)
  add_library(dlms::graphs STATIC IMPORTED)
  set_target_properties(dlms::graphs PROPERTIES
    IMPORTED_LOCATION "${_dlms_root}/lib/libdlms_graphs.a"
    INTERFACE_INCLUDE_DIRECTORIES "${_dlms_root}/include"
    INTERFACE_COMPILE_FEATURES cxx_std_17
    INTERFACE_LINK_LIBRARIES "Threads::Threads;${CMAKE_DL_LIBS}")
endif()
unset(_dlms_root)
