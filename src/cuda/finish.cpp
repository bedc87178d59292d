// finish — host side: which passes a chain needs, their workspace, price and launch.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstdint>

#include "driver.h"
#include "finish_prelude.h"
#include "tile_geometry.h"

namespace tconv::cuda {
namespace {

using std::int64_t;

constexpr int kThreads = 256;
constexpr Config kConfigs[] = {{0, 0, 0, 0, kThreads / 32, 0}};

// As in finish.cu.
struct Arguments {
  const void* input;
  const void* grad_output;
  void* output;
  const void* bias;
  void* mean;
  void* rstd;
  void* partial;
  void* sums;
  long long batch, channels, positions, groups, statistics, chunk, chunks, lanes, mergers, packed;
};

// Neither the number of channels nor any size is compiled in, so that one program serves all layers with this chain.
Step canonical(const Step& step) {
  Step plain;
  plain.problem.dtype = step.problem.dtype;
  plain.problem.layout = step.problem.layout;
  plain.problem.direction = step.problem.direction;
  plain.epilogue = step.epilogue;
  plain.epilogue.save = false;
  return plain;
}

// Slots of the operands that have one value per channel, in order: these gradients are sums.
struct Sums {
  std::vector<int> slots;
  int norm = 0;  // index in slots of the norm's first
  std::string functions;
};

Sums sums_of(const Epilogue& epilogue) {
  Sums sums;
  const int norm = norm_index(epilogue), count = static_cast<int>(epilogue.ops.size());
  std::string before, after;
  int local = 0;
  for (int index = 0; index < count; ++index) {
    const Op& op = epilogue.ops[static_cast<std::size_t>(index)];
    const int slot = operand_offset(epilogue, index);
    if (index == norm) {
      sums.norm = static_cast<int>(sums.slots.size());
      for (int k = 0; k < num_operands(op); ++k) sums.slots.push_back(slot + k);
      local = 0;
      continue;
    }
    std::string& text = norm >= 0 && index > norm ? after : before;
    if (operand_kind(op.kind) == OperandKind::channel) {
      text += "  sums[" + std::to_string(sums.slots.size()) + "] += grad[" + std::to_string(local++) + "];\n";
      sums.slots.push_back(slot);
    } else if (operand_kind(op.kind) == OperandKind::tensor) {
      const std::string to = "to.at[" + std::to_string(slot) + "]";
      text += "  if (" + to + ") static_cast<storage_t*>(" + to + ")[element] = narrow<storage_t>(grad[" +
              std::to_string(local++) + "]);\n";
    }
  }
  const std::string head =
      "(const accum_t* grad, accum_t* sums, long long element, const GradOperands& to) {\n"
      "  (void)grad, (void)sums, (void)element, (void)to;\n";
  sums.functions = "__device__ __forceinline__ void keep_before" + head + before + "}\n" +
                   "__device__ __forceinline__ void keep_after" + head + after + "}\n";
  return sums;
}

// Elements that a thread takes at once. In channels_last each is a channel with registers of its own.
int64_t pack_of(const Problem& problem, const Epilogue& epilogue) {
  const int64_t most = 16 / static_cast<int64_t>(size_of(problem.dtype));
  if (problem.layout == Layout::contiguous) return most;
  if (problem.direction != Direction::grad_epilogue) return std::min<int64_t>(most, 4);
  const std::size_t sums = sums_of(epilogue).slots.size();
  return std::min<int64_t>(sums > 8 ? 1 : sums > 4 ? 2 : 4, size_of(problem.dtype) == 2 ? 4 : most / 2);
}

std::vector<Unit> units(const Step& step) {
  const std::string text = finish_prelude(step);
  const int norm = norm_number(step.epilogue);
  std::vector<Unit> list;
  auto add = [&](const char* entry, bool on_demand = false) {
    list.push_back({"finish.cu", entry, text, kThreads, 0, 100, on_demand});
  };
  const bool gradient = step.problem.direction == Direction::grad_epilogue;
  auto add_moments = [&] {  // a gradient is usually given those of the forward pass
    if (norm == 1) {
      add("finish_row_moments", gradient);
      add("finish_merge_moments", gradient);
    } else if (norm == 2) {
      add("finish_position_moments", gradient);
    }
  };
  if (!gradient) {
    add_moments();
    add("finish_apply");
    return list;
  }
  if (norm == 1) {
    add("finish_grad_rows");
    add("finish_grad_merge");
  } else if (norm == 2) {
    add("finish_grad_positions");
  }
  add("finish_grad_apply");
  if (!sums_of(step.epilogue).slots.empty()) add("finish_channel_sums");
  add_moments();
  return list;
}

struct Geometry {
  Arguments arguments{};
  int64_t row_blocks = 0;                                             // of the kernels that walk along positions
  int64_t position_blocks = 0;                                        // of those that go across channels
  std::size_t partial_bytes = 0, statistic_bytes = 0, sum_bytes = 0;  // each a multiple of 256
  int64_t sums = 0;                                                   // gradients that are sums over a channel
  bool channels_fill_packs = false;                                   // channels_last
};

std::size_t align(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

Geometry geometry(const Problem& problem, const Epilogue& epilogue, const Device& device) {
  Geometry g;
  Arguments& a = g.arguments;
  const int norm = norm_number(epilogue);
  const bool channels_last = problem.layout == Layout::channels_last;
  const std::size_t accum = problem.dtype == DType::f64 ? 8 : 4;
  a.batch = problem.batch;
  a.channels = problem.out_channels;
  a.positions = volume(output_size(problem));
  a.groups = norm == 1 ? epilogue.ops[static_cast<std::size_t>(norm_index(epilogue))].num_groups : 1;
  a.statistics = num_statistics(problem, epilogue);
  if (a.batch == 0 || a.channels == 0 || a.positions == 0) a.batch = a.positions = 0;

  // A piece of a row is at least a few steps of a thread long, and there are enough blocks for eight waves when the
  // tensor is large: uneven blocks at the end then cost little.
  const int64_t wanted_blocks = 8 * 8 * std::max(device.multiprocessors, 1);
  a.lanes = kThreads;
  int64_t rows, least;
  const int64_t pack = pack_of(problem, epilogue);
  g.channels_fill_packs = a.channels % pack == 0;
  if (channels_last) {
    const int64_t packs = std::max<int64_t>(ceil_div(a.channels, pack), 1),
                  columns = std::min<int64_t>(packs, kThreads);
    rows = a.batch * ceil_div(packs, kThreads);
    least = 2 * 4 * (kThreads / columns);
  } else {
    rows = a.batch * a.channels;
    least = 2 * 2 * pack * kThreads;
    while (a.lanes > 8 && a.lanes * pack > a.positions) a.lanes /= 2;
    if (a.lanes < kThreads && a.lanes > 32) a.lanes = 32;  // between a warp and the block there is nothing
  }
  a.chunks = 1;
  if (a.lanes == kThreads && rows > 0 && a.positions > 0) {
    a.chunks = std::clamp<int64_t>(ceil_div(wanted_blocks, rows), 1, std::max<int64_t>(a.positions / least, 1));
  }
  // Pieces of equal length; a multiple of 64 positions keeps whole lines together.
  a.chunk = std::max<int64_t>(ceil_div(a.positions, a.chunks), 1);
  if (a.chunks > 1) a.chunk = ceil_div(a.chunk, 64) * 64;
  a.chunks = std::max<int64_t>(ceil_div(a.positions, a.chunk), a.positions > 0 ? 1 : 0);
  g.row_blocks = a.lanes == kThreads ? rows * a.chunks : ceil_div(rows, kThreads / a.lanes);
  g.position_blocks = a.batch * ceil_div(a.positions, channels_last ? kThreads / 32 : 32);

  const auto per_quantity = static_cast<std::size_t>(a.channels * a.batch * a.chunks) * accum;
  std::size_t quantities = norm == 1 ? 2 : 0;
  if (problem.direction == Direction::grad_epilogue) {
    g.sums = static_cast<int64_t>(sums_of(epilogue).slots.size());
    quantities = std::max(quantities, static_cast<std::size_t>(g.sums));
    g.sum_bytes = align(2 * static_cast<std::size_t>(a.statistics) * accum);
  }
  g.partial_bytes = align(quantities * per_quantity);
  g.statistic_bytes = align(static_cast<std::size_t>(a.statistics) * accum);
  return g;
}

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config&) {
  Fit fit;
  const bool gradient = problem.direction == Direction::grad_epilogue;
  if (!gradient && problem.direction != Direction::epilogue) {
    fit.refusal = "direction " + std::string(to_string(problem.direction)) + " is not an epilogue";
    return fit;
  }
  if (problem.out_channels > INT32_MAX) {
    fit.refusal = "out_channels " + std::to_string(problem.out_channels) + " is more than 2^31 - 1";
    return fit;
  }
  const Geometry g = geometry(problem, epilogue, device);
  if (g.arguments.batch * g.arguments.channels > INT32_MAX || std::max(g.row_blocks, g.position_blocks) > INT32_MAX) {
    fit.refusal = "more than 2^31 - 1 rows or blocks";
    return fit;
  }
  const int norm = norm_number(epilogue);
  const double elements = static_cast<double>(problem.batch) * problem.out_channels * volume(output_size(problem));
  double bytes = static_cast<double>(size_of(problem.dtype) + size_of(epilogue.output_dtype.value_or(problem.dtype)));
  int passes = 1, launches = 1;
  if (gradient) bytes += static_cast<double>(size_of(problem.dtype));
  if (norm == 1 || norm == 2) {
    bytes += static_cast<double>(size_of(problem.dtype));
    if (gradient) bytes += static_cast<double>(size_of(epilogue.output_dtype.value_or(problem.dtype)));
    ++passes;
    launches += norm == 1 ? 2 : 1;
  }
  for (std::size_t i = 0; i < epilogue.ops.size(); ++i) {
    if (operand_kind(epilogue.ops[i].kind) == OperandKind::tensor) {
      bytes += static_cast<double>(size_of(problem.dtype)) * (gradient ? 2 : 1);
    }
  }
  constexpr double kLaunch = 2.5;    // microseconds
  constexpr double kReached = 0.85;  // of the copy bandwidth
  double microseconds = elements * bytes / (kReached * device.bandwidth_tbs * 1e6);
  if (norm == 1 && !gradient) {
    // Each of the two passes is bound by memory or by instructions, which compute what stands before the norm in both.
    // Picoseconds per element on 132 multiprocessors, fitted to chains on an H200.
    double math = 0;
    for (int i = 0; i < norm_index(epilogue); ++i) math += math_of(epilogue.ops[static_cast<std::size_t>(i)].kind);
    const double scale = 132.0 / std::max(device.multiprocessors, 1);
    const double reads = static_cast<double>(size_of(problem.dtype)) / (kReached * device.bandwidth_tbs);
    const double rest = microseconds * 1e6 / std::max(elements, 1.0) - reads;
    microseconds = elements * 1e-6 *
                   (std::max(reads, (0.65 + 0.021 * math) * scale) + std::max(rest, (1.15 + 0.008 * math) * scale));
  }
  fit.microseconds = kLaunch * launches + microseconds;
  fit.workspace_bytes = g.partial_bytes + 2 * g.statistic_bytes + g.sum_bytes;
  fit.fused_ops = static_cast<int>(epilogue.ops.size());
  fit.fused_pre = true;
  return fit;
}

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

void launch(const Step& step, const Tensors& tensors, Stream stream) {
  const Problem& problem = step.problem;
  const Epilogue& epilogue = step.epilogue;
  const bool gradient = problem.direction == Direction::grad_epilogue;
  const int norm = norm_number(epilogue);
  const Geometry& g = prepared<Geometry>(step);
  Arguments a = g.arguments;
  a.input = tensors.input;
  a.grad_output = tensors.grad_output;
  a.output = tensors.output;
  a.bias = tensors.bias;
  auto* workspace = static_cast<std::byte*>(tensors.workspace);
  a.partial = workspace;
  const bool given = gradient && tensors.mean && tensors.rstd;
  a.mean = tensors.mean ? tensors.mean : workspace + g.partial_bytes;
  a.rstd = tensors.rstd ? tensors.rstd : workspace + g.partial_bytes + g.statistic_bytes;
  a.sums = workspace + g.partial_bytes + 2 * g.statistic_bytes;
  a.packed = aligned(a.input) && aligned(a.output) && (!gradient || aligned(a.grad_output)) &&
             (problem.layout == Layout::contiguous || g.channels_fill_packs);

  std::array<const void*, kMaxOperands> operands = tensors.operands;
  std::array<void*, kMaxOperands> grad_operands = tensors.grad_operands;
  void* arguments[] = {&a, operands.data(), grad_operands.data()};
  const Loaded& loaded = loaded_of(step);
  std::size_t next = 0, next_on_demand = 0;
  bool moments = true;
  auto enqueue = [&](int64_t blocks) {
    const Function& function =
        gradient && moments ? loaded.on_demand[next_on_demand++]->get(step.device) : *loaded.functions[next++];
    cuda::launch(function, {static_cast<unsigned>(blocks), 1, 1}, stream, arguments);
  };
  // Threads per sum: a warp, or a block where each of a warp's lanes would have more than eight.
  auto merge = [&](int64_t sums, int64_t pieces) {
    a.mergers = pieces > 256 ? kThreads : 32;
    enqueue(ceil_div(sums, kThreads / a.mergers));
  };
  const int64_t of_group = a.channels / a.groups * a.chunks;
  if (norm == 1 && !given) {
    enqueue(g.row_blocks);
    merge(a.statistics, of_group);
  } else if (norm == 2 && !given) {
    enqueue(g.position_blocks);
  }
  moments = false;
  if (!gradient) {
    enqueue(g.row_blocks);
    return;
  }
  if (norm == 1) {
    enqueue(g.row_blocks);
    merge(a.statistics, of_group);
  } else if (norm == 2) {
    enqueue(g.position_blocks);
  }
  enqueue(g.row_blocks);
  if (g.sums > 0) merge(g.sums * a.channels, a.batch * a.chunks);
}

void prepare_launch(Step& step) { prepare_with(step, geometry(step.problem, step.epilogue, step.device)); }

}  // namespace

int norm_number(const Epilogue& epilogue) {
  const int index = norm_index(epilogue);
  if (index < 0) return 0;
  switch (epilogue.ops[static_cast<std::size_t>(index)].kind) {
    case OpKind::group_norm:
      return 1;
    case OpKind::layer_norm:
      return 2;
    default:
      return 3;
  }
}

double math_of(OpKind kind) {
  switch (kind) {
    case OpKind::softplus:
      return 45;
    case OpKind::mish:
    case OpKind::gelu:
      return 33;
    case OpKind::gelu_tanh:
    case OpKind::elu:
    case OpKind::silu:
    case OpKind::sigmoid:
      return 25;
    case OpKind::tanh:
      return 20;
    default:
      return is_norm(kind) ? 0 : 4;
  }
}

std::string finish_prelude(const Step& step) {
  const Epilogue& epilogue = step.epilogue;
  std::string text = layer_prelude(canonical(step));
  const int norm = norm_index(epilogue);
  auto define = [&](const char* name, const std::string& value) {
    text += std::string("#define ") + name + " " + value + "\n";
  };
  define("TCONV_PACK", std::to_string(pack_of(step.problem, epilogue)));
  define("TCONV_NORM", std::to_string(norm_number(epilogue)));
  if (norm >= 0) {
    const Op& op = epilogue.ops[static_cast<std::size_t>(norm)];
    char eps[40];
    std::snprintf(eps, sizeof eps, "%.17g", op.a);
    define("TCONV_NORM_EPS", eps);
    define("TCONV_NORM_SLOT", std::to_string(operand_offset(epilogue, norm)));
    define("TCONV_NORM_AFFINE", op.affine ? "1" : "0");
  } else {
    define("TCONV_NORM_AFFINE", "0");
  }
  if (step.problem.direction == Direction::grad_epilogue) {
    const Sums sums = sums_of(epilogue);
    define("TCONV_SUMS", std::to_string(sums.slots.size()));
    define("TCONV_NORM_SUM", std::to_string(sums.norm));
    text += "constexpr int kSumSlot[] = {";
    for (const int slot : sums.slots) text += std::to_string(slot) + ", ";
    text += "0};\n" + sums.functions;
  }
  return text;
}

extern const Kernel finish;
const Kernel finish{"finish", kConfigs, fit, units, prepare_launch, launch};

}  // namespace tconv::cuda
