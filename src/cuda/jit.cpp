// jit.cpp — device code compiled at run time: the program's text, NVRTC, the disk cache, the layer's prelude.
//
// Cache     one file per program and target: <folder>/<key>.bin, key = 128-bit FNV-1a of everything that decides the
//           code. Written under another name and renamed, so that readers and concurrent writers see whole files only;
//           a file that is damaged or of another format is compiled again and overwritten.
// Variables TCONV_CACHE_DIR (else $XDG_CACHE_HOME/tconv, else ~/.cache/tconv; empty: no disk cache),
//           TCONV_CACHE_MAX_BYTES (else 512 MiB), TCONV_NVRTC_PATH (folder of libnvrtc).
// SPDX-License-Identifier: Apache-2.0
#include "jit.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "driver.h"

namespace tconv::cuda {
namespace {

namespace fs = std::filesystem;

// ---------------------------------------------------------------------------------------------------------- libnvrtc

using nvrtcProgram = struct _nvrtcProgram*;

struct Nvrtc {
  std::string failure;  // empty: usable
  std::string path;
  int version = 0;           // 1000 * major + minor
  std::vector<int> targets;  // compute capabilities, ascending
  int (*version_of)(int*, int*) = nullptr;
  int (*target_count)(int*) = nullptr;
  int (*target_list)(int*) = nullptr;
  const char* (*error_text)(int) = nullptr;
  int (*create)(nvrtcProgram*, const char*, const char*, int, const char* const*, const char* const*) = nullptr;
  int (*destroy)(nvrtcProgram*) = nullptr;
  int (*compile)(nvrtcProgram, int, const char* const*) = nullptr;
  int (*log_size)(nvrtcProgram, std::size_t*) = nullptr;
  int (*log)(nvrtcProgram, char*) = nullptr;
  int (*cubin_size)(nvrtcProgram, std::size_t*) = nullptr;
  int (*cubin)(nvrtcProgram, char*) = nullptr;
  int (*ptx_size)(nvrtcProgram, std::size_t*) = nullptr;
  int (*ptx)(nvrtcProgram, char*) = nullptr;
};

constexpr int kOldestNvrtc = 11008;  // the first that knows sm_90

struct SearchPaths {
  std::mutex mutex;
  std::vector<std::string> folders;
};
SearchPaths& search_paths() {
  static auto* paths = new SearchPaths;
  return *paths;
}

// NVRTC opens libnvrtc-builtins by its bare name while it compiles; a copy that lives outside the loader's folders is
// only found when it is open already.
void open_builtins(const fs::path& folder) {
  std::error_code ignored;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("libnvrtc-builtins.so")) dlopen(entry.path().c_str(), RTLD_NOW | RTLD_GLOBAL);
  }
}

void* open_nvrtc(std::string& tried) {
  static constexpr const char* kNames[] = {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"};
  std::vector<std::string> folders;
  const char* chosen = std::getenv("TCONV_NVRTC_PATH");
  if (chosen && *chosen) folders.push_back(chosen);
  const bool only_chosen = !folders.empty();
  if (!only_chosen) {
    // One that PyTorch has loaded serves best: it matches the driver that PyTorch was chosen for.
    for (const char* name : kNames) {
      if (void* handle = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return handle;
    }
    std::lock_guard lock(search_paths().mutex);
    folders = search_paths().folders;
  }
  auto try_folders = [&](const std::vector<std::string>& list) -> void* {
    for (const std::string& folder : list) {
      for (const char* name : kNames) {
        const fs::path path = fs::path(folder) / name;
        std::error_code ignored;
        if (!fs::exists(path, ignored)) continue;
        open_builtins(folder);
        if (void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
      }
      tried += (tried.empty() ? "" : ", ") + folder;
    }
    return nullptr;
  };
  if (void* handle = try_folders(folders)) return handle;
  if (only_chosen) return nullptr;
  for (const char* name : kNames) {
    if (void* handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return handle;
  }
  tried += std::string(tried.empty() ? "" : ", ") + "the system's library folders";
  return try_folders({"/usr/local/cuda/lib64", "/usr/local/cuda/targets/x86_64-linux/lib",
                      "/usr/local/cuda/targets/sbsa-linux/lib", "/opt/cuda/lib64"});
}

Nvrtc find_nvrtc() {
  Nvrtc nvrtc;
  const std::string needed = "NVRTC " + std::to_string(kOldestNvrtc / 1000) + "." +
                             std::to_string(kOldestNvrtc % 1000) + " or newer (pip install nvidia-cuda-nvrtc)";
  std::string tried;
  void* handle = open_nvrtc(tried);
  if (!handle) {
    nvrtc.failure = "CUDA: libnvrtc cannot be opened; looked in " + tried + ". Needed: " + needed;
    return nvrtc;
  }
  bool complete = true;
  auto find = [&](auto& pointer, const char* name) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(dlsym(handle, name));
    complete = complete && pointer;
  };
  find(nvrtc.version_of, "nvrtcVersion");
  find(nvrtc.target_count, "nvrtcGetNumSupportedArchs");
  find(nvrtc.target_list, "nvrtcGetSupportedArchs");
  find(nvrtc.error_text, "nvrtcGetErrorString");
  find(nvrtc.create, "nvrtcCreateProgram");
  find(nvrtc.destroy, "nvrtcDestroyProgram");
  find(nvrtc.compile, "nvrtcCompileProgram");
  find(nvrtc.log_size, "nvrtcGetProgramLogSize");
  find(nvrtc.log, "nvrtcGetProgramLog");
  find(nvrtc.cubin_size, "nvrtcGetCUBINSize");
  find(nvrtc.cubin, "nvrtcGetCUBIN");
  find(nvrtc.ptx_size, "nvrtcGetPTXSize");
  find(nvrtc.ptx, "nvrtcGetPTX");
  int major = 0, minor = 0;
  if (nvrtc.version_of) nvrtc.version_of(&major, &minor);
  nvrtc.version = 1000 * major + minor;
  Dl_info info{};
  if (nvrtc.version_of && dladdr(reinterpret_cast<void*>(nvrtc.version_of), &info) && info.dli_fname) {
    nvrtc.path = info.dli_fname;
    open_builtins(fs::path(nvrtc.path).parent_path());
  }
  if (!complete || nvrtc.version < kOldestNvrtc) {
    nvrtc.failure = "CUDA: NVRTC is too old: found " + std::to_string(major) + "." + std::to_string(minor) + " at " +
                    nvrtc.path + ". Needed: " + needed;
    return nvrtc;
  }
  int count = 0;
  if (nvrtc.target_count(&count) == 0 && count > 0) {
    nvrtc.targets.resize(static_cast<std::size_t>(count));
    nvrtc.target_list(nvrtc.targets.data());
    std::sort(nvrtc.targets.begin(), nvrtc.targets.end());
  }
  return nvrtc;
}

const Nvrtc& nvrtc_or_failure() {
  static const auto* nvrtc = new Nvrtc(find_nvrtc());
  return *nvrtc;
}

// --------------------------------------------------------------------------------------------------- program's text

// The compiler's number-of-lines view: #line directives keep the names and lines of the files in messages.
void append_file(std::string& out, std::string_view text, std::string_view name, std::set<std::string>& included) {
  int line = 1;
  out += "#line 1 \"" + std::string(name) + "\"\n";
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size() - 1);
    const std::string_view row = text.substr(0, end + 1);
    text.remove_prefix(end + 1);
    ++line;
    constexpr std::string_view kInclude = "#include \"";
    if (row.starts_with(kInclude)) {
      const std::size_t close = row.find('"', kInclude.size());
      const std::string file(row.substr(kInclude.size(), close - kInclude.size()));
      if (included.insert(file).second) append_file(out, embedded_source(file), file, included);
      out += "#line " + std::to_string(line) + " \"" + std::string(name) + "\"\n";
    } else if (!row.starts_with("#pragma once")) {
      out += row;
    } else {
      out += '\n';
    }
  }
  if (!out.empty() && out.back() != '\n') out += '\n';
}

std::string key_of(std::string_view text) {
  __extension__ using Wide = unsigned __int128;
  const Wide prime = (Wide{1} << 88) + 0x13b;
  Wide hash = (Wide{0x6c62272e07bb0142ull} << 64) + 0x62b821756295c58dull;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * prime;
  char hex[33];
  std::snprintf(hex, sizeof hex, "%016llx%016llx", static_cast<unsigned long long>(hash >> 64),
                static_cast<unsigned long long>(hash));
  return hex;
}

// --------------------------------------------------------------------------------------------------------- the cache

struct Built {
  std::string code;
  std::string log;
};

constexpr char kMagic[8] = {'t', 'c', 'o', 'n', 'v', 'b', '0', '1'};

std::optional<fs::path> cache_folder() {
  if (const char* chosen = std::getenv("TCONV_CACHE_DIR")) {
    if (!*chosen) return std::nullopt;
    return fs::path(chosen);
  }
  const char* base = std::getenv("XDG_CACHE_HOME");
  if (base && *base) return fs::path(base) / "tconv";
  const char* home = std::getenv("HOME");
  if (home && *home) return fs::path(home) / ".cache" / "tconv";
  return std::nullopt;
}

std::uintmax_t cache_limit() {
  const char* text = std::getenv("TCONV_CACHE_MAX_BYTES");
  if (text && *text) return std::strtoull(text, nullptr, 10);
  return std::uintmax_t{512} << 20;
}

// magic, key, sizes of log and code, both, then the key of all that precedes.
std::string encode(const std::string& key, const Built& built) {
  std::string file(kMagic, sizeof kMagic);
  file += key;
  for (const std::uint64_t size : {std::uint64_t{built.log.size()}, std::uint64_t{built.code.size()}}) {
    file.append(reinterpret_cast<const char*>(&size), sizeof size);
  }
  file += built.log;
  file += built.code;
  return file + key_of(file);
}

std::optional<Built> decode(const std::string& key, std::string_view file) {
  constexpr std::size_t kHeader = sizeof kMagic + 32 + 16, kTrailer = 32;
  if (file.size() < kHeader + kTrailer) return std::nullopt;
  if (file.substr(0, sizeof kMagic) != std::string_view(kMagic, sizeof kMagic)) return std::nullopt;
  if (file.substr(sizeof kMagic, 32) != key) return std::nullopt;
  std::uint64_t sizes[2];
  std::memcpy(sizes, file.data() + sizeof kMagic + 32, sizeof sizes);
  const std::size_t payload = file.size() - kHeader - kTrailer;
  if (sizes[0] > payload || sizes[1] != payload - sizes[0]) return std::nullopt;
  if (file.substr(file.size() - kTrailer) != key_of(file.substr(0, file.size() - kTrailer))) return std::nullopt;
  return Built{std::string(file.substr(kHeader + sizes[0], sizes[1])), std::string(file.substr(kHeader, sizes[0]))};
}

std::optional<Built> read_cache(const std::string& key) {
  const std::optional<fs::path> folder = cache_folder();
  if (!folder) return std::nullopt;
  const fs::path path = *folder / (key + ".bin");
  std::ifstream stream(path, std::ios::binary);
  if (!stream) return std::nullopt;
  const std::string file((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  std::optional<Built> built = decode(key, file);
  std::error_code ignored;
  if (built) fs::last_write_time(path, fs::file_time_type::clock::now(), ignored);  // used last, deleted last
  return built;
}

// Deletes the entries used longest ago until three quarters of the limit are left, so that it runs rarely.
void trim_cache(const fs::path& folder) {
  struct Entry {
    fs::file_time_type time;
    std::uintmax_t bytes;
    fs::path path;
  };
  std::vector<Entry> entries;
  std::uintmax_t total = 0;
  std::error_code error;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    const std::string extension = it->path().extension().string();
    if (extension != ".bin" && extension != ".part") continue;
    std::error_code gone;  // another process may delete at the same time
    const auto time = it->last_write_time(gone);
    const auto bytes = it->file_size(gone);
    if (gone) continue;
    // A writer that died leaves its part behind.
    if (extension == ".part") {
      if (fs::file_time_type::clock::now() - time > std::chrono::hours(1)) fs::remove(it->path(), gone);
      continue;
    }
    entries.push_back({time, bytes, it->path()});
    total += bytes;
  }
  const std::uintmax_t limit = cache_limit();
  if (total <= limit) return;
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.time < b.time; });
  for (const Entry& entry : entries) {
    if (total <= limit / 4 * 3) break;
    std::error_code gone;
    fs::remove(entry.path, gone);
    total -= entry.bytes;
  }
}

// A cache that cannot be written (read-only home, full disk) costs time, not the result.
void write_cache(const std::string& key, const Built& built) {
  const std::optional<fs::path> folder = cache_folder();
  if (!folder) return;
  std::error_code error;
  fs::create_directories(*folder, error);
  static std::atomic<int> counter{0};
  const fs::path part =
      *folder / (key + "." + std::to_string(getpid()) + "." + std::to_string(counter.fetch_add(1)) + ".part");
  {
    std::ofstream stream(part, std::ios::binary | std::ios::trunc);
    const std::string file = encode(key, built);
    stream.write(file.data(), static_cast<std::streamsize>(file.size()));
    stream.close();
    if (!stream) {
      fs::remove(part, error);
      return;
    }
  }
  fs::rename(part, *folder / (key + ".bin"), error);
  if (error) fs::remove(part, error);
  trim_cache(*folder);
}

// ------------------------------------------------------------------------------------------------------- compilation

// NVRTC's targets end where it was made; a newer GPU takes PTX of the newest target it knows.
std::string target_option(const Nvrtc& nvrtc, std::string_view arch, bool& machine_code) {
  machine_code = true;
  const int wanted = std::atoi(std::string(arch.substr(3)).c_str());
  if (nvrtc.targets.empty() || std::binary_search(nvrtc.targets.begin(), nvrtc.targets.end(), wanted)) {
    return "--gpu-architecture=" + std::string(arch);
  }
  int newest = 0;
  for (const int target : nvrtc.targets) {
    if (target <= wanted) newest = std::max(newest, target);
  }
  if (newest == 0) {
    throw std::runtime_error("CUDA: NVRTC " + std::to_string(nvrtc.version / 1000) + "." +
                             std::to_string(nvrtc.version % 1000) + " (" + nvrtc.path + ") cannot compile for " +
                             std::string(arch));
  }
  machine_code = false;
  return "--gpu-architecture=compute_" + std::to_string(newest);
}

Built run_nvrtc(const Nvrtc& nvrtc, const std::string& text, const std::string& name,
                const std::vector<std::string>& options, bool machine_code) {
  auto require = [&](int code, const char* call) {
    if (code) throw std::runtime_error(std::string("CUDA: ") + call + ": " + nvrtc.error_text(code));
  };
  nvrtcProgram program = nullptr;
  require(nvrtc.create(&program, text.c_str(), name.c_str(), 0, nullptr, nullptr), "nvrtcCreateProgram");
  struct Destroy {
    const Nvrtc& nvrtc;
    nvrtcProgram& program;
    ~Destroy() { nvrtc.destroy(&program); }
  } destroy{nvrtc, program};
  std::vector<const char*> arguments;
  for (const std::string& option : options) arguments.push_back(option.c_str());
  const int code = nvrtc.compile(program, static_cast<int>(arguments.size()), arguments.data());
  Built built;
  std::size_t size = 0;
  if (nvrtc.log_size(program, &size) == 0 && size > 1) {
    built.log.resize(size);
    nvrtc.log(program, built.log.data());
    built.log.resize(std::strlen(built.log.c_str()));
  }
  if (code) {
    throw std::runtime_error("CUDA: NVRTC " + std::to_string(nvrtc.version / 1000) + "." +
                             std::to_string(nvrtc.version % 1000) + " cannot compile " + name + " (" + options[0] +
                             "): " + nvrtc.error_text(code) + "\n" + built.log);
  }
  if (machine_code) {
    require(nvrtc.cubin_size(program, &size), "nvrtcGetCUBINSize");
    built.code.resize(size);
    require(nvrtc.cubin(program, built.code.data()), "nvrtcGetCUBIN");
  } else {
    require(nvrtc.ptx_size(program, &size), "nvrtcGetPTXSize");
    built.code.resize(size);
    require(nvrtc.ptx(program, built.code.data()), "nvrtcGetPTX");
  }
  return built;
}

// Reads what `ptxas -v` says of one entry.
void read_report(const std::string& log, const std::string& entry, BuildReport& report) {
  std::istringstream lines(log);
  std::string line;
  bool ours = false;
  auto number_before = [&](const char* words) -> std::size_t {
    const std::size_t at = line.find(words);
    if (at == std::string::npos) return 0;
    std::size_t begin = at;
    while (begin > 0 && std::isdigit(static_cast<unsigned char>(line[begin - 1]))) --begin;
    return std::strtoull(line.substr(begin, at - begin).c_str(), nullptr, 10);
  };
  while (std::getline(lines, line)) {
    if (line.find("Compiling entry function") != std::string::npos) {
      ours = line.find("'" + entry + "'") != std::string::npos;
    }
    if (!ours) continue;
    // Of the entry, then of every function that it calls.
    if (line.find("stack frame") != std::string::npos) {
      report.stack_bytes += number_before(" bytes stack frame");
      report.spill_bytes += number_before(" bytes spill stores") + number_before(" bytes spill loads");
    }
    if (line.find("Used ") != std::string::npos) {
      report.registers = static_cast<int>(number_before(" registers"));
      report.static_shared_bytes = number_before(" bytes smem");
    }
  }
}

// Every program that this process has compiled or read, so that a second thread or a second entry waits instead of
// compiling again.
struct Programs {
  std::mutex mutex;
  std::unordered_map<std::string, std::shared_future<std::shared_ptr<const Built>>> built;
};
Programs& programs() {
  static auto* instance = new Programs;
  return *instance;
}

}  // namespace

void add_search_path(std::string folder) {
  std::lock_guard lock(search_paths().mutex);
  search_paths().folders.push_back(std::move(folder));
}

std::string missing_compiler() { return nvrtc_or_failure().failure; }

void forget_programs() {
  std::lock_guard lock(programs().mutex);
  programs().built.clear();
}

std::string program_text(const Unit& unit) {
  std::set<std::string> included;
  std::string source, prelude;
  // The prelude's includes come first, but an entry's define before everything.
  append_file(prelude, unit.prelude, "prelude of " + unit.source, included);
  append_file(source, embedded_source(unit.source), unit.source, included);
  std::string text;
  if (source.find("TCONV_ENTRY_") != std::string::npos) text = "#define TCONV_ENTRY_" + unit.entry + " 1\n";
  return text + prelude + source;
}

std::string arch_of(const Device& device) {
  if (device.compute_capability == 90) return "sm_90a";
  return "sm_" + std::to_string(device.compute_capability);
}

std::string compile(const Unit& unit, std::string_view arch, BuildReport* report) {
  const auto begin = std::chrono::steady_clock::now();
  const Nvrtc& nvrtc = nvrtc_or_failure();
  if (!nvrtc.failure.empty()) throw std::runtime_error(nvrtc.failure);
  bool machine_code = true;
  std::vector<std::string> options = {target_option(nvrtc, arch, machine_code), "--std=c++17", "-default-device",
                                      // fp32 quotients within 2 ulp: a silu has 17 instructions instead of 126
                                      "--prec-div=false"};
  if (machine_code) options.push_back("--ptxas-options=-v");
  std::string identity = "nvrtc " + std::to_string(nvrtc.version);
  for (const std::string& option : options) identity += ' ' + option;
  std::string text, key;
  {
    // One after the other, so that a short program does not overtake one that was started before it (load_all).
    static std::mutex turn;
    std::lock_guard lock(turn);
    text = program_text(unit);
    key = key_of(identity + '\n' + text);
  }

  std::promise<std::shared_ptr<const Built>> promise;
  std::shared_future<std::shared_ptr<const Built>> future;
  bool mine = false, from_cache = true;
  {
    std::lock_guard lock(programs().mutex);
    auto [entry, inserted] = programs().built.try_emplace(key);
    if (inserted) entry->second = promise.get_future().share();
    future = entry->second;
    mine = inserted;
  }
  if (mine) {
    try {
      std::optional<Built> built = read_cache(key);
      from_cache = built.has_value();
      if (!built) {
        built = run_nvrtc(nvrtc, text, unit.source, options, machine_code);
        write_cache(key, *built);
      }
      promise.set_value(std::make_shared<const Built>(std::move(*built)));
    } catch (...) {
      promise.set_exception(std::current_exception());
      std::lock_guard lock(programs().mutex);
      programs().built.erase(key);
    }
  }
  const std::shared_ptr<const Built> built = future.get();
  if (report) {
    *report = {};
    read_report(built->log, unit.entry, *report);
    report->from_cache = from_cache;
    report->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  return built->code;
}

// ------------------------------------------------------------------------------------------------- the layer's prelude

namespace {

struct Formula {
  const char* value;
  const char* d_x;
  const char* d_v;
};

// In the order of OpKind; the norms have none.
constexpr Formula kFormulas[] = {
#define POINTWISE(name, operand, scalars, value, d_x, d_v) {#value, #d_x, #d_v},
#define NORM(name, ...) {nullptr, nullptr, nullptr},
#include "tconv/epilogue.def"
};

const char* storage_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float";
    case DType::f64:
      return "double";
    case DType::f16:
      return "f16_t";
    case DType::bf16:
      return "bf16_t";
  }
  return "";
}

std::string literal(double value) {
  if (std::isnan(value)) return "(tconv_nan())";
  if (std::isinf(value)) return value > 0 ? "(tconv_infinity())" : "(-tconv_infinity())";
  char text[40];
  std::snprintf(text, sizeof text, "%.17g", value);
  std::string result = text;
  if (result.find_first_of(".e") == std::string::npos) result += ".0";
  return "(" + result + ")";
}

constexpr const char* kPlace = "int channel, long long element, const Operands& operands";

// One operation: its value, and its derivatives by x and by its operand.
std::string op_text(const std::string& name, const Op& op) {
  const Formula& formula = kFormulas[static_cast<int>(op.kind)];
  const char* results[3] = {formula.value, formula.d_x, formula.d_v};
  const char* suffixes[3] = {"", "_d_x", "_d_v"};
  std::string text;
  for (int i = 0; i < 3; ++i) {
    text += "template <typename T> __device__ __forceinline__ T " + name + suffixes[i] + "(T x, T v) {\n";
    text += "  const T a = T" + literal(op.a) + ", b = T" + literal(op.b) + ";\n";
    text += std::string("  (void)x, (void)v, (void)a, (void)b;\n  return T(") + results[i] + ");\n}\n";
  }
  return text;
}

std::string operand_text(const Op& op, int slot) {
  switch (operand_kind(op.kind)) {
    case OperandKind::none:
      return "T(0)";
    case OperandKind::channel:
      return "tconv_channel_operand<T>(operands, " + std::to_string(slot) + ", channel)";
    case OperandKind::tensor:
      return "tconv_tensor_operand<T>(operands, " + std::to_string(slot) + ", element)";
  }
  return "";
}

// ops[first, last) as one function, and its derivative: `grad` is the gradient of the result; `grad_operand[k]` receives
// that of the k-th operand of these operations, and the gradient of x is returned.
std::string chain_text(const std::string& name, const Epilogue& epilogue, int first, int last,
                       const std::string& op_name, bool with_gradient) {
  std::string text;
  std::string forward = "template <typename T> __device__ __forceinline__ T " + name + "(T x, " + kPlace + ") {\n" +
                        "  (void)channel, (void)element, (void)operands;\n";
  std::string recompute, backward;
  int count = 0;
  for (int i = first; i < last; ++i) {
    const Op& op = epilogue.ops[static_cast<std::size_t>(i)];
    const std::string call = op_name + std::to_string(i), index = std::to_string(i - first);
    text += op_text(call, op);
    const std::string operand = operand_text(op, operand_offset(epilogue, i));
    forward += "  x = " + call + "<T>(x, " + operand + ");\n";
    recompute += "  const T v" + index + " = " + operand + ";\n";
    recompute +=
        "  const T x" + std::to_string(i - first + 1) + " = " + call + "<T>(x" + index + ", v" + index + ");\n";
    std::string step;
    if (operand_kind(op.kind) != OperandKind::none) {
      step += "  grad_operand[" + std::to_string(count++) + "] = grad * " + call + "_d_v<T>(x" + index + ", v" + index +
              ");\n";
    }
    step += "  grad = grad * " + call + "_d_x<T>(x" + index + ", v" + index + ");\n";
    backward = step + backward;
  }
  text += forward + "  return x;\n}\n";
  if (!with_gradient) return text;
  text += "constexpr int " + name + "_operands = " + std::to_string(count) + ";\n";
  text += "template <typename T> __device__ __forceinline__ T " + name + "_grad(T x0, T grad, " + kPlace +
          ", T* grad_operand) {\n  (void)channel, (void)element, (void)operands, (void)grad_operand;\n" + recompute;
  if (last > first) text += "  (void)x" + std::to_string(last - first) + ";\n";
  return text + backward + "  return grad;\n}\n";
}

}  // namespace

std::string layer_prelude(const Step& step) {
  const Problem& problem = step.problem;
  const Epilogue& epilogue = step.epilogue;
  std::string text;
  auto define = [&](const std::string& name, std::int64_t value) {
    text += "#define " + name + " " + std::to_string(value) + "\n";
  };
  define("TCONV_RANK", problem.rank);
  define("TCONV_GROUPS", problem.groups);
  define("TCONV_CI", problem.in_channels / problem.groups);
  define("TCONV_CO", problem.out_channels / problem.groups);
  for (int dim = 0; dim < 3; ++dim) {
    const std::string index = std::to_string(dim);
    const auto at = static_cast<std::size_t>(dim);
    define("TCONV_K" + index, problem.kernel[at]);
    define("TCONV_S" + index, problem.stride[at]);
    define("TCONV_P" + index, problem.padding[at]);
    define("TCONV_D" + index, problem.dilation[at]);
  }
  text += "#define TCONV_DTYPE_" + std::string(to_string(problem.dtype)) + " 1\n";
  define("TCONV_CHANNELS_LAST", problem.layout == Layout::channels_last);
  define("TCONV_TF32", problem.precision == Precision::tf32 && problem.dtype == DType::f32);
  define("TCONV_BIAS", epilogue.bias);
  define("TCONV_PRE", !epilogue.pre.empty());
  const int norm = norm_index(epilogue);
  const int count = static_cast<int>(epilogue.ops.size());
  const int before = norm < 0 ? count : norm;
  define("TCONV_OPS", before);  // operations in tconv_epilogue
  text += "#include \"epilogue.cuh\"\n";
  text += std::string("using storage_t = ") + storage_type(problem.dtype) + ";\n";
  text += std::string("using operand_t = ") + storage_type(epilogue.operand_dtype.value_or(problem.dtype)) + ";\n";
  text += std::string("using output_t = ") + storage_type(epilogue.output_dtype.value_or(problem.dtype)) + ";\n";
  text += std::string("using accum_t = ") + (problem.dtype == DType::f64 ? "double" : "float") + ";\n";
  text += "#include \"operands.cuh\"\n";
  const bool gradient = problem.direction == Direction::grad_epilogue;
  text += "template <typename T> __device__ __forceinline__ T tconv_pre(T x);\n";
  std::string pre;
  for (std::size_t i = 0; i < epilogue.pre.size(); ++i) {
    const std::string call = "tconv_pre_op" + std::to_string(i);
    text += op_text(call, epilogue.pre[i]);
    pre += "  x = " + call + "<T>(x, T(0));\n";
  }
  text += "template <typename T> __device__ __forceinline__ T tconv_pre(T x) {\n" + pre + "  return x;\n}\n";
  text += chain_text("tconv_epilogue", epilogue, 0, before, "tconv_op", gradient);
  if (norm >= 0) text += chain_text("tconv_after", epilogue, norm + 1, count, "tconv_op", gradient);
  return text;
}

}  // namespace tconv::cuda
