// element.h — one element of any dtype, read and written as double; plain code for the reference and for host logic.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "tconv/problem.h"

namespace tconv::cpu {

inline float half_to_float(std::uint16_t bits) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(bits & 0x7fff) << 13;
  // Multiplying moves the exponent and is exact for subnormals; infinity and NaN need all exponent bits.
  const std::uint32_t value = (bits & 0x7c00) == 0x7c00
                                  ? magnitude | 0x7f800000u
                                  : std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  return std::bit_cast<float>(value | static_cast<std::uint32_t>(bits & 0x8000) << 16);
}

// Round to nearest even, straight from double, so that there is one rounding only.
inline std::uint16_t double_to_half(double value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < std::ldexp(1, -14))  // subnormal: units of 2^-24
    return static_cast<std::uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(magnitude, 24))));
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent - 1), 2^exponent)
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));  // [1024, 2048]
  return static_cast<std::uint16_t>(sign | (((exponent + 13) << 10) + mantissa));  // 1024 carries into the exponent
}

inline float bfloat_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

inline std::uint16_t double_to_bfloat(double value) {
  if (std::isnan(value)) return 0x7fc0;
  // To odd on the way to fp32, so that the second rounding sees every lost bit.
  float single = static_cast<float>(value);
  std::uint32_t bits = std::bit_cast<std::uint32_t>(single);
  if (std::isfinite(single) && static_cast<double>(single) != value) {
    if (std::fabs(static_cast<double>(single)) > std::fabs(value)) --bits;
    bits |= 1;
  }
  bits += 0x7fff + ((bits >> 16) & 1);
  return static_cast<std::uint16_t>(bits >> 16);
}

inline double load_element(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::f32:
      return static_cast<const float*>(data)[index];
    case DType::f64:
      return static_cast<const double*>(data)[index];
    case DType::f16:
      return half_to_float(static_cast<const std::uint16_t*>(data)[index]);
    case DType::bf16:
      return bfloat_to_float(static_cast<const std::uint16_t*>(data)[index]);
  }
  return 0;
}

inline void store_element(void* data, DType dtype, std::int64_t index, double value) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      return;
    case DType::f64:
      static_cast<double*>(data)[index] = value;
      return;
    case DType::f16:
      static_cast<std::uint16_t*>(data)[index] = double_to_half(value);
      return;
    case DType::bf16:
      static_cast<std::uint16_t*>(data)[index] = double_to_bfloat(value);
      return;
  }
}

// Where element (b, c, position) of an activation tensor lies.
inline std::int64_t element_index(Layout layout, std::int64_t channels, std::int64_t positions, std::int64_t b,
                                  std::int64_t c, std::int64_t position) {
  return layout == Layout::contiguous ? (b * channels + c) * positions + position
                                      : (b * positions + position) * channels + c;
}

}  // namespace tconv::cpu
