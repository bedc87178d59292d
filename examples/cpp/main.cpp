// Doubles the size of an image with a transposed convolution whose weights are the bilinear filter, in one fused call
// with a ReLU, and checks it: a linear ramp stays linear.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "tconv/tconv.h"

int main() {
  const int channels = 8, height = 60, width = 80;

  // One group per channel, kernel 4, stride 2, padding 1: the output is twice as large.
  tconv::Problem problem = tconv::parse_problem("2d g8 c8>8 i60x80 t4x4 s2 p1");
  const tconv::Dims size = tconv::output_size(problem);

  std::vector<float> input(tconv::input_elements(problem)), weight(tconv::weight_elements(problem)),
      bias(channels, 1.0f), output(tconv::output_elements(problem));
  for (int c = 0, i = 0; c < channels; ++c) {
    for (int y = 0; y < height; ++y) {
      for (int x = 0; x < width; ++x) input[i++] = static_cast<float>(c + 2 * y + 3 * x);
    }
  }
  const float bilinear[4] = {0.25f, 0.75f, 0.75f, 0.25f};
  for (int c = 0, i = 0; c < channels; ++c) {
    for (float row : bilinear) {
      for (float column : bilinear) weight[i++] = row * column;
    }
  }

  tconv::Tensors tensors;
  tensors.input = input.data();
  tensors.weight = weight.data();
  tensors.bias = bias.data();
  tensors.output = output.data();
  const auto plan = tconv::plan(problem, tconv::parse_epilogue("bias relu"), tconv::cpu_device());
  std::printf("%s", tconv::explain(*plan).c_str());
  tconv::execute(*plan, tensors);

  // Away from the border, output (y, x) lies at input ((y - 0.5) / 2, (x - 0.5) / 2).
  double worst = 0;
  for (int c = 0; c < channels; ++c) {
    for (int y = 1; y + 1 < size[1]; ++y) {
      for (int x = 1; x + 1 < size[2]; ++x) {
        const double expected = 1 + c + 2 * (y - 0.5) / 2 + 3 * (x - 0.5) / 2;
        worst = std::max(worst, std::fabs(output[(c * size[1] + y) * size[2] + x] - expected));
      }
    }
  }
  std::printf("%d x %d -> %d x %d, largest error %g\n", height, width, static_cast<int>(size[1]),
              static_cast<int>(size[2]), worst);
  return worst < 1e-3 ? 0 : 1;
}
