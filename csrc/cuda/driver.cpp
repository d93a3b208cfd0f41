#include "driver.h"

#include <memory>
#include <mutex>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace dlms::cuda {
namespace {

#if defined(__APPLE__)
constexpr const char* kLibrary = "libcuda.dylib";
#else
constexpr const char* kLibrary = "libcuda.so.1";
#endif

void* open_library(const char* path, const char* what) {
#if defined(_WIN32)
  (void)path, (void)what;
  throw DriverError("captured runs are not supported on Windows");
#else
  // Never closed: what it gave out lives as long as the process.
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw DriverError(std::string(what) + ": " + dlerror());
  return library;
#endif
}

void* find(void* library, const char* symbol, bool required) {
#if defined(_WIN32)
  (void)library, (void)symbol, (void)required;
  return nullptr;
#else
  void* function = dlsym(library, symbol);
  if (function == nullptr && required)
    throw DriverError(std::string("the CUDA driver has no ") + symbol +
                      ": captured runs need a driver for CUDA 12 or newer");
  return function;
#endif
}

std::unique_ptr<Driver> load(const char* path) {
  void* library = open_library(path, "no CUDA driver");
  auto made = std::make_unique<Driver>();
#define DLMS_REQUIRED(member, symbol, parameters) \
  made->member = reinterpret_cast<int(*) parameters>(find(library, symbol, true));
#define DLMS_OPTIONAL(member, symbol, parameters) \
  made->member = reinterpret_cast<int(*) parameters>(find(library, symbol, false));
  DLMS_DRIVER_REQUIRED(DLMS_REQUIRED)
  DLMS_DRIVER_OPTIONAL(DLMS_OPTIONAL)
#undef DLMS_REQUIRED
#undef DLMS_OPTIONAL
  made->check(made->init(0), "cuInit");
  return made;
}

struct Drivers {
  std::mutex mutex;
  std::vector<std::unique_ptr<Driver>> loaded; // never freed: runs refer to theirs
  const Driver* current = nullptr;
};

Drivers& drivers() {
  static Drivers* instance = new Drivers; // never destroyed: runs may outlive static objects
  return *instance;
}

} // namespace

void Driver::check(int status, const char* what) const {
  if (status == 0) return;
  const char* text = nullptr;
  if (error_string(status, &text) != 0 || text == nullptr) text = "unknown error";
  throw DriverError(std::string(what) + ": " + text + " (" + std::to_string(status) + ")");
}

const Driver& driver() {
  Drivers& all = drivers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (all.current == nullptr) {
    all.loaded.push_back(load(kLibrary));
    all.current = all.loaded.back().get();
  }
  return *all.current;
}

void use_driver(const std::string& path) {
  Drivers& all = drivers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (path.empty()) {
    all.current = nullptr;
    return;
  }
  all.loaded.push_back(load(path.c_str()));
  all.current = all.loaded.back().get();
}

std::string driver_problem() {
  try {
    driver();
    return "";
  } catch (const DriverError& error) {
    return error.what();
  }
}

void* library_symbol(const std::string& path, const char* symbol) {
  void* function = find(open_library(path.c_str(), "cannot load"), symbol, false);
  if (function == nullptr) throw DriverError(path + " has no " + symbol);
  return function;
}

PrimaryContext::PrimaryContext(const Driver& driver, int ordinal) : driver_(driver) {
  driver_.check(driver_.device_get(&device_, ordinal), "cuDeviceGet");
  driver_.check(driver_.primary_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

PrimaryContext::~PrimaryContext() {
  driver_.primary_release(device_);
}

ContextScope::ContextScope(const Driver& driver, Context context) : driver_(driver) {
  driver_.check(driver_.context_push(context), "cuCtxPushCurrent");
}

ContextScope::~ContextScope() {
  Context previous = nullptr;
  driver_.context_pop(&previous);
}

} // namespace dlms::cuda
