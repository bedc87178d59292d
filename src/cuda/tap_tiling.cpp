// tap_tiling.cpp — see tap_tiling.h.
// SPDX-License-Identifier: Apache-2.0
#include "tap_tiling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace tconv::cuda {
namespace {

using std::int64_t;

// How channel_sum divides the positions of an image, for one strip of channels at a time.
struct Segments {
  int64_t strips, count, length;
};

// Sixteen blocks a multiprocessor where positions allow 512 a block; at most 8192. With 8192 always, a channels_last layer
// of few images has a few dozen blocks, each of which walks 1024 positions a thread.
Segments segments_of(const Problem& problem) {
  const int64_t positions = volume(output_size(problem)), channels = problem.out_channels;
  Segments s{};
  s.strips = problem.layout == Layout::channels_last && channels > 1 ? ceil_div(channels, 32) : channels;
  const int64_t rows = std::max<int64_t>(1, s.strips * problem.batch);
  s.count = std::min(ceil_div(positions, 512), std::max(ceil_div(int64_t{16 * 132}, rows), ceil_div(positions, 8192)));
  s.count = std::max<int64_t>(1, s.count);
  s.length = std::max<int64_t>(1, ceil_div(positions, s.count));
  return s;
}

}  // namespace

TapSlices tap_slices(const Problem& problem, int limit, int multiple) {
  TapSlices g;
  g.num_taps = static_cast<int>(volume(problem.kernel));
  const int kd = static_cast<int>(problem.kernel[0]), kh = static_cast<int>(problem.kernel[1]),
            kw = static_cast<int>(problem.kernel[2]);
  g.fixed = kd * kh * kw <= limit ? 0 : kh * kw <= limit ? 1 : 2;
  g.width_parts = g.fixed == 2 ? static_cast<int>(ceil_div(kw, limit)) : 1;
  g.width_taps = static_cast<int>(ceil_div(kw, g.width_parts));
  const int taps = g.fixed == 0 ? kd * kh * kw : g.fixed == 1 ? kh * kw : g.width_taps;
  g.taps = static_cast<int>(ceil_div(taps, multiple) * multiple);
  g.slices = g.fixed == 0 ? 1 : g.fixed == 1 ? kd : kd * kh * g.width_parts;
  for (int dim = 0; dim < 3; ++dim)
    for (int t = 0; t < problem.kernel[dim]; ++t)
      g.offset[dim].push_back(static_cast<int>(problem.dilation[dim] * t - problem.padding[dim]));
  for (int slice = 0; slice < g.slices; ++slice) {
    const int td0 = g.fixed == 1 ? slice : g.fixed == 2 ? slice / g.width_parts / kh : 0;
    const int th0 = g.fixed == 2 ? slice / g.width_parts % kh : 0;
    const int tw0 = g.fixed == 2 ? slice % g.width_parts * g.width_taps : 0;
    g.slice_offset.push_back(g.fixed >= 1 ? g.offset[0][td0] : 0);
    g.slice_offset.push_back(g.fixed >= 2 ? g.offset[1][th0] : 0);
    for (int j = 0; j < g.taps; ++j) {
      const bool exists = j < taps && (g.fixed < 2 || tw0 + j < kw);
      g.slice_tap.push_back(exists ? (td0 * kh + th0) * kw + tw0 + j : -1);
    }
  }
  return g;
}

std::vector<int> TapSlices::staged(int dim) const { return dim < fixed ? std::vector<int>{0} : offset[dim]; }

std::vector<int> TapSlices::tap_words(const Rows& rows_d, const Rows& rows_h, const std::vector<int>& column_word,
                                      int row_words) const {
  const int kh = static_cast<int>(offset[1].size()), kw = static_cast<int>(offset[2].size());
  const int staged_rows = static_cast<int>(rows_h.relative.size());
  std::vector<int> words;
  for (std::size_t at = 0; at < slice_tap.size(); ++at) {
    const int tap = slice_tap[at] >= 0 ? slice_tap[at] : slice_tap[at / taps * taps];  // repeats the slice's first
    const int td = tap / kw / kh, th = tap / kw % kh;
    words.push_back((rows_d.tap_slot[fixed >= 1 ? 0 : td] * staged_rows + rows_h.tap_slot[fixed >= 2 ? 0 : th]) *
                        row_words +
                    column_word[tap % kw]);
  }
  return words;
}

TapTiling tap_tiling(const Problem& problem, int block_positions, int limit, int multiple, int input_channels,
                     int grad_channels, const std::function<std::size_t(int)>& shared_bytes, std::size_t shared_limit) {
  TapTiling g;
  static_cast<TapSlices&>(g) = tap_slices(problem, limit, multiple);
  const std::vector<int> staged_d = g.staged(0), staged_h = g.staged(1);

  double best = std::numeric_limits<double>::max();
  for (int tw = 8; tw <= block_positions; tw *= 2)
    for (int th = 1; th * tw <= block_positions; th *= 2) {
      const int td = block_positions / (tw * th);
      if (problem.stride[0] * (td - 1) > 4096 || problem.stride[1] * (th - 1) > 4096) continue;
      const Rows rows_d = rows_of(td, static_cast<int>(problem.stride[0]), staged_d);
      const Rows rows_h = rows_of(th, static_cast<int>(problem.stride[1]), staged_h);
      const Columns columns = columns_of(tw, static_cast<int>(problem.stride[2]), g.offset[2]);
      const int64_t positions =
          static_cast<int64_t>(rows_d.relative.size() * rows_h.relative.size() * columns.base.size()) * columns.length;
      if (positions > 65536) continue;
      const int pitch = static_cast<int>(ceil_div(std::max<int64_t>(positions - 4, 0), 32) * 32 + 4);
      const std::size_t shared = shared_bytes(pitch);
      if (shared > shared_limit) continue;
      const int64_t tiles =
          ceil_div(problem.input[0], td) * ceil_div(problem.input[1], th) * ceil_div(problem.input[2], tw);
      const double cost = static_cast<double>(tiles) *
                          (static_cast<double>(input_channels) * block_positions +
                           static_cast<double>(grad_channels) * static_cast<double>(positions)) *
                          (1.0 + 2.0 / tw);
      if (cost < best) {
        best = cost;
        g.tile[0] = td, g.tile[1] = th, g.tile[2] = tw;
        g.rows[0] = rows_d, g.rows[1] = rows_h, g.columns = columns;
        g.grad_positions = static_cast<int>(positions);
        g.grad_pitch = pitch;
        g.shared_bytes = shared;
      }
    }
  if (g.tile[2] == 0) return g;
  for (int dim = 0; dim < 3; ++dim) g.tiles[dim] = ceil_div(problem.input[dim], g.tile[dim]);
  g.num_tiles = g.tiles[0] * g.tiles[1] * g.tiles[2] * problem.batch;

  const int row_words = static_cast<int>(g.columns.base.size()) * g.columns.length;
  g.tap_word = g.tap_words(g.rows[0], g.rows[1], g.columns.tap_word, row_words);
  return g;
}

std::string tiling_text(const TapTiling& g) {
  std::ostringstream text;
  auto define = [&text](const char* name, auto value) { text << "#define " << name << ' ' << value << '\n'; };
  define("TG_TD", g.tile[0]);
  define("TG_TH", g.tile[1]);
  define("TG_TW", g.tile[2]);
  define("TG_ND", g.rows[0].relative.size());
  define("TG_NH", g.rows[1].relative.size());
  define("TG_NPW", g.columns.base.size());
  define("TG_JW", g.columns.length);
  define("TG_STEP_D", g.rows[0].step);
  define("TG_STEP_H", g.rows[1].step);
  define("TG_GRAD_PITCH", g.grad_pitch);
  define("TG_ROWS_D", list(g.rows[0].relative));
  define("TG_ROWS_H", list(g.rows[1].relative));
  define("TG_PLANES_W", list(g.columns.base));
  define("TG_SLICE_OFFSET", list(g.slice_offset));
  define("TG_TAP_WORD", list(g.tap_word));
  return text.str();
}

TapArguments tap_arguments(const Problem& problem, const Tensors& tensors, const TapTiling& tiling, int shares) {
  TapArguments args;
  const Dims output = output_size(problem);
  args.input = tensors.input;
  args.grad_output = tensors.grad_output;
  args.partial = tensors.workspace;
  for (int dim = 0; dim < 3; ++dim) {
    args.input_size[dim] = static_cast<int>(problem.input[dim]);
    args.grad_size[dim] = static_cast<int>(output[dim]);
    args.tiles[dim] = static_cast<int>(tiling.tiles[dim]);
  }
  args.shares = shares;
  args.num_tiles = tiling.num_tiles;
  return args;
}

int shares_of(int64_t others, int64_t most, int multiprocessors) {
  double best = 0;
  int64_t chosen = 1;
  for (int wave = 1; wave <= 4; ++wave) {
    const int64_t shares = std::clamp<int64_t>(int64_t{wave} * multiprocessors / others, 1, std::max<int64_t>(1, most));
    const double waves = std::ceil(static_cast<double>(others * shares) / multiprocessors);
    const double use = static_cast<double>(others * shares) / (waves * multiprocessors) - 0.03 * wave;
    if (wave > 1 && use <= best) continue;
    best = use;
    chosen = shares;
  }
  return static_cast<int>(chosen);
}

std::size_t bias_floats(const Problem& problem) {
  return static_cast<std::size_t>(problem.out_channels * problem.batch * segments_of(problem).count);
}

void launch_sums(const Step& step, const Tensors& tensors, Stream stream, std::int64_t elements, int summands,
                 std::size_t partial_floats) {
  const void* partial = tensors.workspace;
  void* grad_weight = tensors.output;
  unsigned fragments = static_cast<unsigned>(elements / 4);
  int lanes = 1;
  while (lanes < 8 && lanes < summands) lanes *= 2;
  void* args[] = {&partial, &grad_weight, &summands, &fragments, &lanes};
  launch_behind(function(step, 1), {static_cast<unsigned>(ceil_div(int64_t{fragments} * lanes, 256))}, stream, args);
  launch_bias_sums(step, tensors, stream, partial_floats);
}

void launch_bias_sums(const Step& step, const Tensors& tensors, Stream stream, std::size_t partial_floats) {
  const Problem& problem = step.problem;
  if (tensors.grad_bias == nullptr) return;
  float* partial = static_cast<float*>(tensors.workspace) + partial_floats;
  const void* grad_output = tensors.grad_output;
  void* grad_bias = tensors.grad_bias;
  const Segments split = segments_of(problem);
  long long positions = volume(output_size(problem)), length = split.length;
  int segments = static_cast<int>(split.count), count = static_cast<int>(problem.batch) * segments;
  if (count > 0) {
    void* args[] = {&grad_output, &partial, &positions, &segments, &length};
    launch(function(step, 2), {static_cast<unsigned>(split.strips * count)}, stream, args);
  }
  void* args[] = {&partial, &grad_bias, &count};
  launch_behind(function(step, 3), {static_cast<unsigned>(problem.out_channels)}, stream, args);
}

}  // namespace tconv::cuda
