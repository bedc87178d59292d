# cmake -DTEXTS="a.cu;b.cuh" -DGENERATED=out.cpp -P embed.cmake — writes tconv::cuda::embedded_source over those files.
# SPDX-License-Identifier: Apache-2.0
set(code "// Generated from the device sources; do not edit.
#include <stdexcept>
#include <string>
#include <string_view>

namespace tconv::cuda {
std::string_view embedded_source(std::string_view name);

namespace {
struct Text {
  std::string_view name, text;
};
constexpr Text kTexts[] = {
")
foreach(path IN LISTS TEXTS)
  file(READ "${path}" text)
  get_filename_component(name "${path}" NAME)
  string(APPEND code "    {\"${name}\", R\"device(${text})device\"},\n")
endforeach()
string(APPEND code "};
}  // namespace

std::string_view embedded_source(std::string_view name) {
  for (const Text& text : kTexts) {
    if (text.name == name) return text.text;
  }
  throw std::invalid_argument(\"no embedded device source is named \" + std::string(name));
}
}  // namespace tconv::cuda
")
file(WRITE "${GENERATED}" "${code}")
