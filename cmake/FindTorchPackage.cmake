# Finds the folder of the torch package: headers and libraries are all that is needed of it.
#
# Not find_package(Torch): with a CUDA build of torch that demands a CUDA toolkit. Not `import torch`:
# slow, and an isolated build (plain `pip install .`) does not have it in sys.path, although it is on
# disk in the environment that pip installs into. So the build needs no torch of its own to download.
#
# Sets DLMS_TORCH_FOUND, DLMS_TORCH, DLMS_TORCH_VERSION, or DLMS_TORCH_PROBLEM.

set(DLMS_TORCH_FOUND FALSE)
if(DLMS_TORCH_DIR)
  set(DLMS_TORCH "${DLMS_TORCH_DIR}")
else()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
    OUTPUT_VARIABLE DLMS_TORCH OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()

if(NOT DLMS_TORCH)
  set(DLMS_TORCH_PROBLEM
    "No torch was found for ${Python_EXECUTABLE}: install torch >= 2.11 first, or give its folder with -DDLMS_TORCH_DIR=.../site-packages/torch.")
elseif(NOT EXISTS "${DLMS_TORCH}/version.py")
  set(DLMS_TORCH_PROBLEM "${DLMS_TORCH} is not a torch package: it has no version.py.")
else()
  file(STRINGS "${DLMS_TORCH}/version.py" line REGEX "^__version__ *=" LIMIT_COUNT 1)
  string(REGEX MATCH "[0-9]+\\.[0-9]+(\\.[0-9]+)?" DLMS_TORCH_VERSION "${line}")
  if(DLMS_TORCH_VERSION VERSION_LESS 2.11)
    set(DLMS_TORCH_PROBLEM
      "${DLMS_TORCH} is torch ${DLMS_TORCH_VERSION}; 2.11 or newer is needed.")
  else()
    set(DLMS_TORCH_FOUND TRUE)
  endif()
endif()
