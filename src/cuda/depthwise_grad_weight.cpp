// depthwise_grad_weight — host side: which sums share a thread, the products written out, price and launch.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <set>

#include "driver.h"
#include "lattice.h"
#include "tile_geometry.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr Config kConfigs[] = {{0, 0, 0, 0, kWarps, 0}};

constexpr int64_t kMaxRegisters = 128;  // sums, window and elements of grad_output of a thread, of 255
constexpr int64_t kMaxUnrolled = 512;   // products written out for one turn of the window, otherwise the window moves
constexpr int64_t kMaxProducts = 4096;  // written out in all: about a second of compilation
constexpr int64_t kRowsAhead = 4;       // cells of height between the call to L2 and the read
constexpr int64_t kMaxPhases = 32;      // of height times width
constexpr int64_t kLongestStrip = 32;   // cells: the window's first rows are then under a tenth of all reads
constexpr int64_t kMaxPartialBytes = int64_t{256} << 20;

// As in depthwise_grad_weight.cu.
struct Arguments {
  const void* input;
  const void* grad_output;
  void* grad_weight;
  void* grad_bias;
  void* partial;
  long long input_size[3];
  long long output_size[3];
  unsigned cells, columns, strip, places, tiles, items, shares, share;
};

std::string text_of(int64_t value) { return std::to_string(value); }

// One thread's sums: some depth taps of one phase of depth, some height taps, all width taps.
struct Variant {
  int64_t phase = 0;              // of depth
  std::vector<PhaseTap> taps[3];  // shifts and phases of depth and height count from slice, row and grad_row
  int64_t slice = 0, row = 0, grad_row = 0;
  bool bias = false;  // reads every element of its phase
  std::vector<int64_t> slices, columns, grad_rows, grad_columns;
  int64_t span = 0;  // rows of the window
  int64_t kind = 0;  // its class

  int64_t sums() const { return static_cast<int64_t>(taps[0].size() * taps[1].size() * taps[2].size()); }
  int64_t input_reads() const { return static_cast<int64_t>(slices.size() * columns.size()); }
  int64_t grad_reads() const { return static_cast<int64_t>(grad_rows.size() * grad_columns.size()); }
  int64_t registers() const { return sums() + input_reads() * (span + 1) + 2 * grad_reads(); }
  bool moves() const { return span * sums() > kMaxUnrolled; }
};

std::vector<int64_t> distinct(const std::vector<PhaseTap>& taps, int64_t PhaseTap::* field) {
  std::set<int64_t> values;
  for (const PhaseTap& tap : taps) values.insert(tap.*field);
  return {values.begin(), values.end()};
}

Variant variant_of(const Problem& problem, int64_t phase, std::vector<PhaseTap> depth, std::vector<PhaseTap> height,
                   const std::vector<PhaseTap>& width, bool bias) {
  Variant v;
  v.phase = phase;
  v.bias = bias;
  const auto from_least = [](std::vector<PhaseTap>& taps, int64_t PhaseTap::* field) {
    int64_t least = 0;
    for (std::size_t i = 0; i < taps.size(); ++i) least = i ? std::min(least, taps[i].*field) : taps[i].*field;
    for (PhaseTap& tap : taps) tap.*field -= least;
    return least;
  };
  v.slice = from_least(depth, &PhaseTap::shift);
  v.row = from_least(height, &PhaseTap::shift);
  v.grad_row = bias ? 0 : from_least(height, &PhaseTap::phase);
  v.taps[0] = std::move(depth), v.taps[1] = std::move(height), v.taps[2] = width;
  if (v.sums() > 0) {
    v.slices = distinct(v.taps[0], &PhaseTap::shift);
    v.columns = distinct(width, &PhaseTap::shift);
    v.span = distinct(v.taps[1], &PhaseTap::shift).back() + 1;
    v.grad_rows = distinct(v.taps[1], &PhaseTap::phase);
    v.grad_columns = distinct(width, &PhaseTap::phase);
  }
  if (bias) {
    v.grad_rows.clear(), v.grad_columns.clear();
    for (int64_t r = 0; r < problem.stride[1]; ++r) v.grad_rows.push_back(r);
    for (int64_t r = 0; r < problem.stride[2]; ++r) v.grad_columns.push_back(r);
  }
  return v;
}

// The body of add_cells for one class.
std::string cells_text(const Problem& problem, const Variant& v) {
  std::string out;
  const auto input_name = [](std::size_t slice, int64_t row, std::size_t column) {
    return "i" + text_of(static_cast<int64_t>(slice)) + "_" + text_of(row) + "_" +
           text_of(static_cast<int64_t>(column));
  };
  const auto grad_name = [](int64_t row, int64_t column) { return "g" + text_of(row) + "_" + text_of(column); };
  // Contiguous: a row of inputs and a cell of grad_output are read one turn ahead of their use, as they are stored (n_ and
  // m_), and rows of grad_output are called to L2 some turns before. channels_last: the same took a third longer for
  // mednext_depthwise (0.39 instead of 0.29 ms on an H100), so there they are read where they are used.
  const bool ahead = problem.layout == Layout::contiguous;
  // What exists of slices, columns and places of a cell, as bits of words: a predicate for each would take a register each.
  const std::size_t first_column = v.slices.size(), first_place = first_column + v.columns.size();
  const std::size_t num_bits = first_place + v.grad_columns.size();
  const auto word_of = [](std::size_t index) { return "there" + text_of(static_cast<int64_t>(index / 32)); };
  const auto bit = [&](std::size_t index) {
    return "(" + word_of(index) + " >> " + text_of(static_cast<int64_t>(index % 32)) + " & 1u)";
  };
  const auto set_bits = [&](std::size_t first, const std::vector<int64_t>& offsets, const std::string& from,
                            const std::string& size) {
    for (std::size_t i = 0; i < offsets.size(); ++i)
      out += "  " + word_of(first + i) + " |= static_cast<unsigned>(static_cast<unsigned>(" + from + " + (" +
             text_of(offsets[i]) + ")) < static_cast<unsigned>(" + size + ")) << " +
             text_of(static_cast<int64_t>((first + i) % 32)) + ";\n";
  };
  const auto each_input = [&](auto&& text) {
    std::string all;
    for (std::size_t s = 0; s < v.slices.size(); ++s) {
      for (std::size_t c = 0; c < v.columns.size(); ++c) {
        all += text(s, c, "n" + text_of(static_cast<int64_t>(s)) + "_" + text_of(static_cast<int64_t>(c)),
                    bit(s) + " && " + bit(first_column + c));
      }
    }
    return all;
  };
  const auto each_grad = [&](auto&& text) {
    std::string all;
    for (const int64_t r : v.grad_rows) {
      for (std::size_t c = 0; c < v.grad_columns.size(); ++c)
        all += text(r, v.grad_columns[c], "m" + text_of(r) + "_" + text_of(v.grad_columns[c]), bit(first_place + c));
    }
    return all;
  };
  const auto read_row = [&] {
    return "    in = static_cast<unsigned>(h) < static_cast<unsigned>(size[1]);\n" +
           each_input([&](std::size_t s, std::size_t c, const std::string& name, const std::string& there) {
             return "    " + name + " = stored_at(in && " + there + ", input + (" + text_of(v.slices[s]) +
                    " * slice + (" + text_of(v.columns[c]) + ") * kInputStep));\n";
           }) +
           "    input += row, ++h;\n";
  };
  const auto use_row = [&](int64_t slot) {
    return each_input([&](std::size_t s, std::size_t c, const std::string& name, const std::string& there) {
      return "    " + input_name(s, slot, c) + " = input_of(in && " + there + ", " + name + ");\n";
    });
  };
  const auto read_cell = [&] {
    return each_grad([&](int64_t r, int64_t c, const std::string& name, const std::string& there) {
             return "    " + name + " = stored_at(left > " + text_of(r) + " && " + there + ", grad + (" + text_of(r) +
                    " * grad_row + " + text_of(c) + " * kGradStep));\n";
           }) +
           "    grad += " + text_of(problem.stride[1]) + " * grad_row, left -= " + text_of(problem.stride[1]) + ";\n";
  };
  const auto call_rows = [&] {
    std::string text;
    for (const int64_t r : v.grad_rows) {
      const std::string row = text_of(r + kRowsAhead * problem.stride[1]);
      text += "    if (left > " + row + " && " + bit(first_place) + ") fetch_to_l2(grad + (" + row + " * grad_row + " +
              text_of(v.grad_columns[0]) + "));\n";
    }
    return text;
  };
  for (std::size_t i = 0; i < num_bits; i += 32) out += "  unsigned " + word_of(i) + " = 0;\n";
  set_bits(0, v.slices, "d", "size[0]");
  set_bits(first_column, v.columns, "w", "size[2]");
  set_bits(first_place, v.grad_columns, "x", "grad_width");
  // The compiler would see through the bits.
  for (std::size_t i = 0; i < num_bits; i += 32) out += "  asm(\"\" : \"+r\"(" + word_of(i) + "));\n";
  for (int64_t row = 0; row < v.span; ++row) {
    for (std::size_t s = 0; s < v.slices.size(); ++s) {
      for (std::size_t c = 0; c < v.columns.size(); ++c) out += "  accum_t " + input_name(s, row, c) + " = 0;\n";
    }
  }
  if (v.span > 0) out += "  bool in;\n";
  out += each_input([](std::size_t, std::size_t, const std::string& name, const std::string&) {
    return "  storage_t " + name + ";\n";
  });
  out += each_grad(
      [](int64_t, int64_t, const std::string& name, const std::string&) { return "  storage_t " + name + ";\n"; });
  for (int64_t row = 0; row + 1 < v.span; ++row) out += "  {\n" + read_row() + use_row(row) + "  }\n";
  const std::string reads = (v.span > 0 ? read_row() : "") + (ahead ? call_rows() : "") + read_cell();
  if (ahead) out += "  {\n" + reads + "  }\n";
  const int64_t turns = v.moves() || v.span == 0 ? 1 : v.span;
  out += "#pragma unroll 1\n  for (unsigned n = 0; n < strip; n += " + text_of(turns) + ") {\n";
  for (int64_t turn = 0; turn < turns; ++turn) {
    const auto slot = [&](int64_t row) { return (turn + row) % v.span; };
    out += "  {\n" + (ahead ? "" : reads);
    out += each_grad([&](int64_t r, int64_t c, const std::string& name, const std::string&) {
      return "    const accum_t " + grad_name(r, c) + " = widen(" + name + ");\n";
    });
    if (v.span > 0) out += use_row(slot(v.span - 1));
    if (ahead) out += reads;
    if (v.bias) {
      for (const int64_t r : v.grad_rows) {
        for (const int64_t c : v.grad_columns)
          out += "    sum[" + text_of(v.sums()) + "] += " + grad_name(r, c) + ";\n";
      }
    }
    int64_t sum = 0;
    for (const PhaseTap& t_0 : v.taps[0]) {
      const auto s =
          static_cast<std::size_t>(std::find(v.slices.begin(), v.slices.end(), t_0.shift) - v.slices.begin());
      for (const PhaseTap& t_1 : v.taps[1]) {
        for (const PhaseTap& t_2 : v.taps[2]) {
          const auto c =
              static_cast<std::size_t>(std::find(v.columns.begin(), v.columns.end(), t_2.shift) - v.columns.begin());
          out += "    sum[" + text_of(sum++) + "] += " + input_name(s, slot(t_1.shift), c) + " * " +
                 grad_name(t_1.phase, t_2.phase) + ";\n";
        }
      }
    }
    if (v.moves()) {
      for (int64_t row = 0; row + 1 < v.span; ++row) {
        for (std::size_t s = 0; s < v.slices.size(); ++s) {
          for (std::size_t c = 0; c < v.columns.size(); ++c)
            out += "    " + input_name(s, row, c) + " = " + input_name(s, row + 1, c) + ";\n";
        }
      }
    }
    out += "  }\n";
  }
  return out + "  }\n";
}

struct Geometry {
  std::string refusal;
  int64_t lanes = 1;  // channels side by side
  std::vector<Variant> variants;
  std::vector<std::string> classes;  // their texts
  std::vector<int64_t> sums;         // of each class
  int64_t bias_sums = 0, most_sums = 0, most_registers = 0, most_grads = 0;
  int64_t channel_tiles = 1, blocks = 0;
  Arguments arguments{};
  std::size_t workspace = 0;
};

// What depends on the layer alone.
Geometry layer_geometry(const Problem& problem) {
  Geometry g;
  const auto refuse = [&](std::string text) {
    g.refusal = std::move(text);
    return g;
  };
  if (problem.direction != Direction::grad_weight)
    return refuse("direction " + std::string(to_string(problem.direction)));
  if (problem.groups == 0 || problem.groups != problem.in_channels) {
    return refuse("groups " + text_of(problem.groups) + " is not in_channels " + text_of(problem.in_channels));
  }
  if (problem.stride[0] * problem.stride[1] * problem.stride[2] > kMaxPhases) {
    return refuse(text_of(problem.stride[0] * problem.stride[1] * problem.stride[2]) + " phases, at most " +
                  text_of(kMaxPhases));
  }
  if (volume(problem.kernel) > kMaxProducts) {
    return refuse(text_of(volume(problem.kernel)) + " taps, at most " + text_of(kMaxProducts));
  }
  if (problem.layout == Layout::channels_last) {
    while (g.lanes < 32 && g.lanes < problem.out_channels) g.lanes *= 2;
  }
  std::vector<PhaseTap> taps[3];
  for (int dim = 0; dim < 3; ++dim) taps[dim] = phase_taps(lattice(problem, dim));
  // Neighbouring shifts together keep the window small.
  const auto by_shift = [](const PhaseTap& a, const PhaseTap& b) {
    return a.shift != b.shift ? a.shift < b.shift : a.phase < b.phase;
  };
  std::sort(taps[1].begin(), taps[1].end(), by_shift);
  const int64_t most = problem.dtype == DType::f64 ? kMaxRegisters / 2 : kMaxRegisters;
  int64_t written = 0;
  for (int64_t phase = 0; phase < problem.stride[0]; ++phase) {
    std::vector<PhaseTap> depth;
    for (const PhaseTap& tap : taps[0]) {
      if (tap.phase == phase) depth.push_back({tap.tap, 0, tap.shift});
    }
    std::sort(depth.begin(), depth.end(), by_shift);
    // As many depth taps, then as many height taps, as the registers hold.
    const auto part = [](const std::vector<PhaseTap>& all, int64_t parts, int64_t index) {
      const auto size = static_cast<int64_t>(all.size());
      return std::vector<PhaseTap>(all.begin() + index * size / parts, all.begin() + (index + 1) * size / parts);
    };
    int64_t parts[2] = {1, 1};
    const auto fits = [&] {
      for (int64_t i = 0; i < parts[0]; ++i) {
        for (int64_t j = 0; j < parts[1]; ++j) {
          const bool bias = i == 0 && j == 0;
          if (variant_of(problem, phase, part(depth, parts[0], i), part(taps[1], parts[1], j), taps[2], bias)
                  .registers() > most)
            return false;
        }
      }
      return true;
    };
    while (!fits()) {
      if (parts[0] < static_cast<int64_t>(depth.size())) {
        ++parts[0];
      } else if (parts[1] < problem.kernel[1]) {
        ++parts[1];
      } else {
        return refuse("kernel width " + text_of(problem.kernel[2]) + ": a row of taps does not fit into registers");
      }
    }
    for (int64_t i = 0; i < parts[0]; ++i) {
      for (int64_t j = 0; j < parts[1]; ++j) {
        const bool bias = i == 0 && j == 0;
        g.bias_sums += bias;
        Variant v = variant_of(problem, phase, part(depth, parts[0], i), part(taps[1], parts[1], j), taps[2], bias);
        const std::string text = cells_text(problem, v);
        v.kind = std::find(g.classes.begin(), g.classes.end(), text) - g.classes.begin();
        if (v.kind == static_cast<int64_t>(g.classes.size())) {
          g.classes.push_back(text);
          g.sums.push_back(v.sums());
          written += v.sums() * (v.moves() ? 1 : std::max<int64_t>(v.span, 1));
        }
        g.most_sums = std::max(g.most_sums, v.sums());
        g.most_registers = std::max(g.most_registers, v.registers());
        g.most_grads = std::max(g.most_grads, v.grad_reads());
        g.variants.push_back(std::move(v));
      }
    }
    if (written > kMaxProducts) {
      return refuse(text_of(written) + " products written out, at most " + text_of(kMaxProducts));
    }
  }
  g.channel_tiles = ceil_div(problem.out_channels, g.lanes);
  return g;
}

// Blocks of a multiprocessor: about 45 registers beside those counted, more for cells of many elements of grad_output, and
// before Hopper. Without a number the compiler aims at more and spills.
int64_t blocks_per_multiprocessor(const Problem& problem, const Device& device, const Geometry& g) {
  const int64_t others = 45 + 6 * std::max<int64_t>(g.most_grads - 4, 0) + (device.compute_capability >= 90 ? 0 : 9);
  const int64_t registers = (problem.dtype == DType::f64 ? 2 : 1) * g.most_registers + others;
  return std::clamp<int64_t>(65536 / (kThreads * registers), 2, 6);
}

Geometry geometry(const Problem& problem, const Device& device) {
  Geometry g = layer_geometry(problem);
  if (!g.refusal.empty()) return g;
  Arguments& a = g.arguments;
  const Dims output = output_size(problem);
  int64_t cells[3];
  for (std::size_t dim = 0; dim < 3; ++dim) {
    a.input_size[dim] = problem.input[dim];
    a.output_size[dim] = output[dim];
    cells[dim] = ceil_div(output[dim], problem.stride[dim]);
    if (std::max(a.input_size[dim], a.output_size[dim]) > INT32_MAX / 4) {
      g.refusal = "a dimension of " + text_of(std::max(problem.input[dim], output[dim])) + ", at most 2^29 - 1";
      return g;
    }
  }
  if (problem.batch * problem.out_channels * cells[0] * cells[1] * cells[2] == 0) return g;
  // The kernel counts from a cell in 32 bits; 64 would take registers that the sums need.
  int64_t slices = 1, rows = 1;
  for (const Variant& v : g.variants) {
    if (!v.slices.empty()) slices = std::max(slices, v.slices.back());
    if (!v.grad_rows.empty()) rows = std::max(rows, v.grad_rows.back() + (kRowsAhead + 1) * problem.stride[1]);
  }
  const bool last = problem.layout == Layout::channels_last;
  const int64_t input_reach = slices * problem.input[1] * problem.input[2] * (last ? problem.groups : 1);
  const int64_t grad_reach = rows * output[2] * (last ? problem.out_channels : 1);
  if (std::max(input_reach, grad_reach) > INT32_MAX) {
    g.refusal = text_of(std::max(input_reach, grad_reach)) + " elements between what a thread reads, at most 2^31 - 1";
    return g;
  }
  // Twice the warps that run at once, so that none waits long for the last.
  const int64_t resident = blocks_per_multiprocessor(problem, device, g) * std::max(device.multiprocessors, 1);
  const int64_t others = g.channel_tiles * static_cast<int64_t>(g.variants.size());
  int64_t strips = ceil_div(cells[1], kLongestStrip);
  const auto items = [&] { return problem.batch * cells[0] * ceil_div(strips * cells[2], 32 / g.lanes); };
  while (others * items() < 2 * kWarps * resident && strips * 8 < cells[1]) strips *= 2;
  const int64_t strip = ceil_div(cells[1], strips);
  strips = ceil_div(cells[1], strip);
  a.cells = static_cast<unsigned>(cells[0]);
  a.columns = static_cast<unsigned>(cells[2]);
  a.strip = static_cast<unsigned>(strip);
  if (std::max(strips * cells[2] + 32, items()) > INT32_MAX) {
    g.refusal = text_of(std::max(strips * cells[2], items())) + " columns of cells, fewer than 2^31 are possible";
    return g;
  }
  a.places = static_cast<unsigned>(strips * cells[2]);
  a.tiles = static_cast<unsigned>(ceil_div(a.places, 32 / g.lanes));
  a.items = static_cast<unsigned>(items());
  int64_t shares = std::clamp<int64_t>(ceil_div(2 * resident, others), 1, ceil_div(a.items, kWarps));
  const int64_t share_bytes =
      problem.out_channels * (volume(problem.kernel) + g.bias_sums) * (problem.dtype == DType::f64 ? 8 : 4);
  shares = std::clamp<int64_t>(kMaxPartialBytes / share_bytes, 1, shares);
  a.share = static_cast<unsigned>(ceil_div(a.items, shares));
  a.shares = static_cast<unsigned>(ceil_div(a.items, a.share));
  g.blocks = others * a.shares;
  g.workspace = static_cast<std::size_t>(ceil_div(share_bytes * a.shares, 256) * 256);
  if (g.blocks > INT32_MAX) g.refusal = text_of(g.blocks) + " blocks, at most 2^31 - 1";
  return g;
}

Fit fit(const Problem& problem, const Epilogue&, const Device& device, const Config&) {
  Fit fit;
  const Geometry g = geometry(problem, device);
  fit.refusal = g.refusal;
  if (!fit) return fit;
  const bool wide = problem.dtype == DType::f64;
  const double slow = wide ? device.fp32_tflops / std::max(device.fp64_tflops, 1e-3) : 1;
  const int64_t apart = problem.layout == Layout::contiguous ? std::min<int64_t>(problem.stride[2], 4) : 1;
  // Issue slots of a warp's step to the next cell, four to the cycle; reads go through one unit.
  double slots = 0;
  for (const Variant& v : g.variants) {
    const auto reads = static_cast<double>(v.input_reads() + v.grad_reads());
    const double issue = static_cast<double>(v.sums()) * slow + 3 * reads + 20;
    slots += std::max(issue, 4 * static_cast<double>(v.input_reads() + v.grad_reads() * apart));
  }
  const double steps = static_cast<double>(g.channel_tiles) * g.arguments.items * g.arguments.strip;
  const double busy = steps * slots * 64 / (device.fp32_tflops * 1e6);
  const double memory = minimum_bytes(problem) / (0.8 * device.bandwidth_tbs * 1e6);
  const double partial = 2 * static_cast<double>(g.workspace) / (0.8 * device.bandwidth_tbs * 1e6);
  fit.microseconds = 8 + std::max(1.3 * busy, memory) + partial;
  fit.workspace_bytes = g.workspace;
  fit.fused_pre = true;
  return fit;
}

std::vector<Unit> units(const Step& step) {
  const Problem& problem = step.problem;
  const Geometry g = layer_geometry(problem);
  Step plain = step;  // bias and chain do not enter
  plain.epilogue.bias = false;
  plain.epilogue.ops.clear();
  std::string text = layer_prelude(plain);
  const auto number = [&](const std::string& name, int64_t value) {
    text += "constexpr int " + name + " = " + text_of(value) + ";\n";
  };
  const auto list = [](const std::vector<int64_t>& values) {
    std::string out = "{";
    for (const int64_t value : values) out += text_of(value) + ",";
    return out + "}";
  };
  number("kThreads", kThreads);
  number("kMinBlocks", blocks_per_multiprocessor(problem, step.device, g));
  number("kLanes", g.lanes);
  number("kSlots", g.most_sums);
  number("kBiasSums", g.bias_sums);
  number("kVariants", static_cast<int64_t>(g.variants.size()));
  number("kClasses", static_cast<int64_t>(g.classes.size()));
  std::vector<int64_t> kind, phase, slice, row, grad_row, bias, first, slot_tap;
  for (const Variant& v : g.variants) {
    kind.push_back(v.kind), phase.push_back(v.phase), slice.push_back(v.slice), row.push_back(v.row);
    grad_row.push_back(v.grad_row);
    bias.push_back(v.bias ? std::count_if(bias.begin(), bias.end(), [](int64_t b) { return b >= 0; }) : -1);
    first.push_back(static_cast<int64_t>(slot_tap.size()));
    for (const PhaseTap& t_0 : v.taps[0]) {
      for (const PhaseTap& t_1 : v.taps[1]) {
        for (const PhaseTap& t_2 : v.taps[2]) {
          slot_tap.push_back((t_0.tap * problem.kernel[1] + t_1.tap) * problem.kernel[2] + t_2.tap);
        }
      }
    }
  }
  const auto table = [&](const std::string& name, const std::vector<int64_t>& values) {
    text += "constexpr int " + name + "[] = " + list(values) + ";\n";
  };
  table("kClass", kind), table("kPhase", phase), table("kSlice", slice), table("kRow", row);
  table("kGradRow", grad_row), table("kBias", bias), table("kFirst", first), table("kSlotTap", slot_tap);
  table("kSums", g.sums);
  std::string phases, shifts;
  const int64_t longest = std::max({problem.kernel[0], problem.kernel[1], problem.kernel[2]});
  for (int dim = 0; dim < 3; ++dim) {
    std::vector<int64_t> tap_phase(static_cast<std::size_t>(longest)), tap_shift(static_cast<std::size_t>(longest));
    for (const PhaseTap& tap : phase_taps(lattice(problem, dim))) {
      tap_phase[static_cast<std::size_t>(tap.tap)] = tap.phase;
      tap_shift[static_cast<std::size_t>(tap.tap)] = tap.shift;
    }
    phases += list(tap_phase) + ",", shifts += list(tap_shift) + ",";
  }
  text += "constexpr int kTapPhase[3][" + text_of(longest) + "] = {" + phases + "};\n";
  text += "constexpr int kTapShift[3][" + text_of(longest) + "] = {" + shifts + "};\n";
  text +=
      "__device__ __forceinline__ storage_t stored_at(bool there, const storage_t* at);\n"
      "__device__ __forceinline__ accum_t input_of(bool there, storage_t stored);\n"
      "__device__ __forceinline__ void fetch_to_l2(const storage_t* at);\n"
      "// input: row h of slice d at column w; grad: a row of the phase at column x, of which `left` follow.\n"
      "template <int kind, int kInputStep, int kGradStep, int count>\n"
      "__device__ __forceinline__ void add_cells(const storage_t* input, const storage_t* grad, const int (&size)[3],\n"
      "                                          int grad_width, int d, int h, int w, int x, int left,\n"
      "                                          unsigned strip, accum_t (&sum)[count]) {\n"
      "  const int row = size[2] * kInputStep, slice = size[1] * row, grad_row = grad_width * kGradStep;\n"
      "  (void)slice;\n";
  for (std::size_t k = 0; k < g.classes.size(); ++k) {
    text += "  if constexpr (kind == " + text_of(static_cast<int64_t>(k)) + ") {\n" + g.classes[k] + "  }\n";
  }
  text += "}\n";
  return {{"depthwise_grad_weight.cu", "depthwise_grad_weight", text, kThreads, 0},
          {"depthwise_grad_weight.cu", "depthwise_sum", text, 256, 0}};
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.device)); }

void launch_step(const Step& step, const Tensors& tensors, Stream stream) {
  const Problem& problem = step.problem;
  const Geometry& g = prepared<Geometry>(step);
  Arguments a = g.arguments;
  a.input = tensors.input;
  a.grad_output = tensors.grad_output;
  a.grad_weight = tensors.output;
  a.grad_bias = tensors.grad_bias;
  a.partial = tensors.workspace;
  void* arguments[] = {&a};
  if (g.blocks > 0) launch(function(step, 0), {static_cast<unsigned>(g.blocks)}, stream, arguments);
  // Without a block there are no shares either, and the sums are zero.
  const int64_t results = problem.out_channels * (volume(problem.kernel) + 1);
  if (results > 0) launch(function(step, 1), {static_cast<unsigned>(ceil_div(results, 32))}, stream, arguments);
}

}  // namespace

extern const Kernel depthwise_grad_weight;
const Kernel depthwise_grad_weight{"depthwise_grad_weight", kConfigs, fit, units, prepare_launch, launch_step};

}  // namespace tconv::cuda
