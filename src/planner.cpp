// planner.cpp — asks every kernel for its price and keeps the cheapest; caches; runs.
//
// A plan is up to three steps:
//   pre     Epilogue::pre on the input, when the convolution does not apply it while reading
//   conv    the convolution with the bias and the first operations of the chain
//   finish  the rest of the chain, in place on the output where the dtypes allow it
// A candidate is priced with the pre and finish steps that it leaves behind, so a kernel that fuses more may be slower
// by itself and still win.
// SPDX-License-Identifier: Apache-2.0
#include "planner.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <functional>
#include <future>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <unordered_map>

#include "hash.h"
#include "measured.h"
#include "pages.h"
#include "simplify.h"

namespace tconv {
namespace {

constexpr std::size_t kAlignment = 256;  // of every buffer in the workspace: cp.async.bulk, AVX-512 and cache lines
constexpr std::size_t kMaxCachedPlans = 4096;

std::size_t align(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool is_convolution(Direction direction) {
  return direction == Direction::forward || direction == Direction::grad_input || direction == Direction::grad_weight;
}

// The cheapest kernel and config for one step; `kernel` is null when nothing fits.
struct Choice {
  const Kernel* kernel = nullptr;
  Config config;
  Fit fit;
};

Choice cheapest(const Problem& problem, const Epilogue& epilogue, const Device& device,
                std::span<const Kernel* const> kernels) {
  Choice best;
  for (const Kernel* kernel : kernels) {
    for (const Config& config : kernel->configs) {
      const Fit fit = kernel->fit(problem, epilogue, device, config);
      if (fit && (best.kernel == nullptr || fit.microseconds < best.fit.microseconds)) best = {kernel, config, fit};
    }
  }
  return best;
}

[[noreturn]] void nothing_fits(const Problem& problem, const Epilogue& epilogue, const Device& device) {
  throw std::runtime_error("no kernel for `" + to_string(problem, epilogue) + "` on " + device.name);
}

// The part of the chain that starts at ops[first], as a chain of its own.
Epilogue rest_of(const Epilogue& epilogue, int first) {
  Epilogue rest = epilogue;
  rest.pre.clear();
  rest.bias = false;
  rest.ops.erase(rest.ops.begin(), rest.ops.begin() + first);
  return rest;
}

// Reads `input`, writes a tensor of the same shape: the problem of the pre step.
Problem pre_problem(const Problem& problem) {
  Problem pre;
  pre.rank = problem.rank;
  pre.batch = problem.batch;
  pre.in_channels = pre.out_channels = problem.in_channels;
  pre.input = problem.input;
  pre.dtype = problem.dtype;
  pre.layout = problem.layout;
  pre.direction = Direction::epilogue;
  return pre;
}

Step make_step(const Choice& choice, const Problem& problem, Epilogue epilogue, const Device& device) {
  Step step;
  step.kernel = choice.kernel;
  step.problem = problem;
  step.epilogue = std::move(epilogue);
  step.config = choice.config;
  step.device = device;
  step.microseconds = choice.fit.microseconds;
  step.workspace_bytes = choice.fit.workspace_bytes;
  return step;
}

// "name" or "name:config"; empty admits all. A config may state its tile, which the kernels' lists leave open.
struct Filter {
  std::string_view name, config;
  Config tile;
  explicit Filter(std::string_view only) {
    const std::size_t colon = only.find(':');
    name = only.substr(0, colon);
    if (colon == std::string_view::npos) return;
    config = only.substr(colon + 1);
    for (std::size_t comma; (comma = config.rfind(',')) != std::string_view::npos;) {
      const char *at = config.data() + comma + 1, *const end = config.data() + config.size();
      const char letter = at == end ? ' ' : *at++;
      if (letter == 't') {
        at = std::from_chars(at, end, tile.tile_h).ptr;
        if (at != end && *at == 'x') at = std::from_chars(at + 1, end, tile.tile_w).ptr;
      } else if (letter == 'b') {
        at = std::from_chars(at, end, tile.weight_stages).ptr;
      }
      const int least = letter == 't' ? std::min(tile.tile_h, tile.tile_w) : letter == 'b' ? tile.weight_stages : 0;
      if (at != end || least < 1) break;
      config = config.substr(0, comma);
    }
  }
  bool admits(const Kernel& kernel) const { return name.empty() || name == kernel.name; }
  bool admits(const Config& listed) const { return config.empty() || config == to_string(listed); }
  bool has_tile() const { return tile != Config{}; }
  Config with_tile(Config listed) const {
    listed.tile_h = tile.tile_h, listed.tile_w = tile.tile_w, listed.weight_stages = tile.weight_stages;
    return listed;
  }
};

// Plans in which the convolution (or the one epilogue step) is chosen among all kernels.
class Planner {
 public:
  Planner(const Problem& problem, const Epilogue& epilogue, const Device& device, std::string_view only,
          std::span<const Kernel* const> kernels)
      : kernels_(kernels), only_(only), filter_(only) {
    plan_.problem = problem;
    plan_.epilogue = epilogue;
    plan_.device = device;
    simple_ = simplify(problem, epilogue);
  }

  Plan make() {
    if (result_is_empty()) return std::move(plan_);
    if (only_.empty()) measured_ = Filter(measured_choice(simple_, plan_.epilogue, plan_.device));
    for (const Kernel* kernel : kernels_) {
      if (!filter_.admits(*kernel)) continue;
      for (const Config& config : kernel->configs) {
        if (!filter_.admits(config)) continue;
        const bool measured = !measured_.name.empty() && measured_.admits(*kernel) && measured_.admits(config);
        consider(*kernel, filter_.with_tile(config), measured && !measured_.has_tile());
        if (measured && measured_.has_tile()) consider(*kernel, measured_.with_tile(config), true);
      }
    }
    if (best_ < 0) refuse();
    plan_.candidates[static_cast<std::size_t>(best_)].chosen = true;
    assemble();
    return std::move(plan_);
  }

 private:
  struct Price {
    Choice conv;
    Epilogue conv_epilogue;  // the part of the chain that the convolution applies
    bool pre_step = false;
    int first_finish_op = -1;  // -1: no finish step
    double microseconds = std::numeric_limits<double>::infinity();
  };

  bool result_is_empty() const {
    switch (plan_.problem.direction) {
      case Direction::forward:
      case Direction::epilogue:
        return output_elements(plan_.problem) == 0;
      case Direction::grad_input:
        return input_elements(plan_.problem) == 0;
      case Direction::grad_weight:    // an empty sum: zeros must be written
      case Direction::grad_epilogue:  // likewise the gradients of operands
        return false;
    }
    return false;
  }

  // Training keeps the convolution's result apart from the chain's. Without operations the two are the same tensor.
  bool keeps_raw() const {
    return plan_.problem.direction == Direction::forward && plan_.epilogue.save && !plan_.epilogue.ops.empty();
  }

  // What the convolution may fuse.
  Epilogue offer() const {
    Epilogue offered = plan_.epilogue;
    if (!is_convolution(plan_.problem.direction)) return offered;
    offered.save = false;
    if (keeps_raw()) {
      offered.ops.clear();
      offered.output_dtype.reset();
    }
    return offered;
  }

  bool converts() const { return plan_.epilogue.output_dtype && *plan_.epilogue.output_dtype != plan_.problem.dtype; }

  void consider(const Kernel& kernel, const Config& config, bool measured) {
    Epilogue offered = offer();
    Fit fit;
    if (kernel.tiles == nullptr && (config.tile_w || config.tile_h || config.weight_stages))
      fit.refusal = "its configs have one tile";
    else
      fit = kernel.fit(simple_, offered, plan_.device, config);
    if (!fit && offered.output_dtype && converts()) {
      // A kernel that cannot store another dtype still does the rest; finish converts.
      offered.output_dtype.reset();
      fit = kernel.fit(simple_, offered, plan_.device, config);
    }
    Candidate candidate{std::string(kernel.name), config, fit, false};
    if (fit) {
      Price price = price_of({&kernel, config, fit}, offered);
      if (Price bare = bare_price(kernel, config); bare.microseconds < price.microseconds) {
        price = std::move(bare);
        candidate.fit.fused_ops = 0;
      }
      candidate.fit.microseconds = price.microseconds;
      candidate.measured = measured;
      if (candidate.measured || (!is_measured_ && price.microseconds < price_.microseconds)) {
        is_measured_ = candidate.measured;
        price_ = std::move(price);
        best_ = static_cast<int>(plan_.candidates.size());
      }
    }
    plan_.candidates.push_back(std::move(candidate));
  }

  // Where a norm needs a pass of its own anyway, what stands before it may cost less there than in the convolution, whose
  // few storing warps have other things to do. CUDA only: on the CPU the chain is applied to what lies in the cache.
  Price bare_price(const Kernel& kernel, const Config& config) {
    Epilogue bare = offer();
    if (plan_.device.backend != Backend::cuda || !is_convolution(plan_.problem.direction) || bare.ops.empty() ||
        norm_index(bare) < 1)
      return {};
    bare.ops.clear();
    bare.output_dtype.reset();
    const Fit fit = kernel.fit(simple_, bare, plan_.device, config);
    return fit ? price_of({&kernel, config, fit}, bare) : Price{};
  }

  Price price_of(Choice conv, Epilogue offered) {
    Price price;
    price.microseconds = conv.fit.microseconds;
    if (is_convolution(plan_.problem.direction)) {
      price.pre_step = !offered.pre.empty() && !conv.fit.fused_pre;
      if (price.pre_step) {
        price.microseconds += pre_choice().fit.microseconds;
        offered.pre.clear();
      }
      const int all = static_cast<int>(plan_.epilogue.ops.size());
      const int fused = std::min(conv.fit.fused_ops, static_cast<int>(offered.ops.size()));
      // The dtype changes with the last operation, so it is the finish step's when there is one.
      if (fused < all || (converts() && !offered.output_dtype)) {
        price.first_finish_op = fused;
        price.microseconds += finish_choice(fused).fit.microseconds;
        offered.output_dtype.reset();
      }
      offered.ops.resize(static_cast<std::size_t>(fused));
    }
    price.conv_epilogue = std::move(offered);
    price.conv = std::move(conv);
    return price;
  }

  const Choice& pre_choice() {
    if (!pre_) {
      const Epilogue chain = pre_epilogue();
      const Problem problem = simplify(pre_problem(plan_.problem), chain);
      pre_ = cheapest(problem, chain, plan_.device, kernels_);
      if (pre_->kernel == nullptr) nothing_fits(problem, chain, plan_.device);
    }
    return *pre_;
  }

  const Choice& finish_choice(int first) {
    finish_.resize(plan_.epilogue.ops.size() + 1);
    std::optional<Choice>& choice = finish_[static_cast<std::size_t>(first)];
    if (!choice) {
      const Epilogue chain = rest_of(plan_.epilogue, first);
      const Problem problem = finish_problem(chain);
      choice = cheapest(problem, chain, plan_.device, kernels_);
      if (choice->kernel == nullptr) nothing_fits(problem, chain, plan_.device);
    }
    return *choice;
  }

  Epilogue pre_epilogue() const {
    Epilogue chain;
    chain.ops = plan_.epilogue.pre;
    return chain;
  }

  Problem finish_problem(const Epilogue& chain) const {
    Problem problem = plan_.problem;
    problem.direction = Direction::epilogue;
    return simplify(problem, chain);
  }

  void assemble() {
    std::size_t offset = 0;
    const auto reserve = [&](std::size_t bytes) {
      const std::size_t start = offset;
      offset += align(bytes);
      return start;
    };
    const std::size_t element = size_of(plan_.problem.dtype);
    if (price_.pre_step) {
      plan_.pre_offset = reserve(static_cast<std::size_t>(input_elements(plan_.problem)) * element);
      plan_.pre_step = static_cast<int>(plan_.steps.size());
      const Epilogue chain = pre_epilogue();
      plan_.steps.push_back(make_step(*pre_, simplify(pre_problem(plan_.problem), chain), chain, plan_.device));
    }
    plan_.conv_step = static_cast<int>(plan_.steps.size());
    plan_.steps.push_back(make_step(price_.conv, simple_, price_.conv_epilogue, plan_.device));
    if (price_.first_finish_op >= 0) {
      if (!keeps_raw() && converts()) {
        plan_.raw_offset = reserve(static_cast<std::size_t>(output_elements(plan_.problem)) * element);
      }
      plan_.finish_step = static_cast<int>(plan_.steps.size());
      const Epilogue chain = rest_of(plan_.epilogue, price_.first_finish_op);
      plan_.steps.push_back(
          make_step(finish_choice(price_.first_finish_op), finish_problem(chain), chain, plan_.device));
      plan_.steps.back().first_operand = operand_offset(plan_.epilogue, price_.first_finish_op);
    }
    // Steps run one after the other, so they share what follows the buffers.
    std::size_t shared = 0;
    for (Step& step : plan_.steps) {
      step.workspace_offset = offset;
      shared = std::max(shared, step.workspace_bytes);
    }
    plan_.workspace_bytes = offset + align(shared);
    plan_.microseconds = price_.microseconds;
  }

  // Of a kernel with many configs those of the sizes that were asked for, or the first ones.
  void append_configs(std::string& names, const Kernel& kernel) const {
    constexpr std::size_t kMost = 24;
    const auto sizes = [](std::string_view config) { return config.substr(0, config.find(',')); };
    std::vector<std::string> alike, all;
    for (const Config& config : kernel.configs) {
      all.push_back(std::string(kernel.name) + ":" + to_string(config));
      if (sizes(to_string(config)) == sizes(filter_.config)) alike.push_back(all.back());
    }
    const std::vector<std::string>& listed = alike.empty() ? all : alike;
    for (std::size_t i = 0; i < std::min(kMost, listed.size()); ++i) names += " " + listed[i];
    if (listed.size() > kMost) names += " and " + std::to_string(listed.size() - kMost) + " more configs";
  }

  [[noreturn]] void refuse() const {
    const std::string line = to_string(plan_.problem, plan_.epilogue);
    if (only_.empty()) nothing_fits(plan_.problem, plan_.epilogue, plan_.device);
    if (plan_.candidates.empty()) {
      std::string names;
      for (const Kernel* kernel : kernels_) {
        names.append(names.empty() ? "" : " ").append(kernel->name);
        if (filter_.admits(*kernel)) append_configs(names, *kernel);
      }
      throw std::invalid_argument("no kernel is named `" + std::string(only_) + "`; known: " + names);
    }
    throw std::invalid_argument("kernel " + std::string(only_) + " refuses `" + line +
                                "`: " + plan_.candidates.front().fit.refusal);
  }

  std::span<const Kernel* const> kernels_;
  std::string_view only_;
  Filter filter_;
  Filter measured_{{}};  // the choice that a table of measurements names; goes before the prices
  bool is_measured_ = false;
  Problem simple_;
  Plan plan_;
  std::optional<Choice> pre_;
  std::vector<std::optional<Choice>> finish_;  // [first operation]
  Price price_;
  int best_ = -1;
};

// ---- the cache ----

struct Entry {
  std::string only;
  std::shared_ptr<const Plan> plan;
  bool matches(const Problem& problem, const Epilogue& epilogue, const Device& device, std::string_view wanted) const {
    return plan->problem == problem && plan->epilogue == epilogue && only == wanted && plan->device == device;
  }
};

struct Cache {
  std::shared_mutex mutex;
  std::unordered_multimap<std::size_t, Entry> entries;
};

Cache& cache() {
  static Cache instance;
  return instance;
}

std::size_t key_of(const Problem& problem, const Epilogue& epilogue, const Device& device, std::string_view only) {
  Hash hash;
  hash.add(static_cast<std::int64_t>(hash_value(problem)));
  if (!epilogue.empty() || epilogue.output_dtype) hash.add(static_cast<std::int64_t>(hash_value(epilogue)));
  hash.add(static_cast<int>(device.backend) | device.index << 4);
  hash.add(device.compute_capability | static_cast<int>(device.isa) << 12 | device.cores << 16);
  if (!only.empty()) hash.add(only);
  return hash.value();
}

std::shared_ptr<const Plan> find(std::size_t key, const Problem& problem, const Epilogue& epilogue,
                                 const Device& device, std::string_view only) {
  const auto [first, last] = cache().entries.equal_range(key);
  for (auto it = first; it != last; ++it) {
    if (it->second.matches(problem, epilogue, device, only)) return it->second.plan;
  }
  return nullptr;
}

// ---- running ----

// Workspace for CPU callers that give none. Up to kKept bytes stay with the thread: given back and taken again in turns
// with PyTorch's own buffers, the 8 MB of packed weights of a vocoder's layer cost 1.3 ms of page clearing in 8.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) {
    if (kept_.size >= bytes) {
      std::swap(block_, kept_);
      return;
    }
    const std::size_t unit = bytes >= kHugePage ? kHugePage : kAlignment;
    block_.size = (bytes + unit - 1) / unit * unit;
    block_.data.reset(std::aligned_alloc(unit, block_.size));
    if (block_.data == nullptr) throw std::bad_alloc();
    prefer_huge_pages(block_.data.get(), block_.size);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (block_.size <= kKept && block_.size > kept_.size) std::swap(block_, kept_);
  }
  void* data() const { return block_.data.get(); }

 private:
  struct Free {
    void operator()(void* data) const { std::free(data); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    std::size_t size = 0;
  };
  static constexpr std::size_t kHugePage = 2 << 20, kKept = 16 << 20;
  static thread_local Block kept_;
  Block block_;
};
thread_local Buffer::Block Buffer::kept_;

std::size_t result_bytes(const Step& step) {
  const Problem& problem = step.problem;
  const bool whole = problem.direction == Direction::forward || problem.direction == Direction::epilogue;
  const std::int64_t elements = problem.direction == Direction::grad_input    ? input_elements(problem)
                                : problem.direction == Direction::grad_weight ? weight_elements(problem)
                                                                              : output_elements(problem);
  const DType dtype = whole ? step.epilogue.output_dtype.value_or(problem.dtype) : problem.dtype;
  return static_cast<std::size_t>(elements) * size_of(dtype);
}

void launch(const Step& step, const Tensors& tensors, Stream stream) {
  if (step.device.backend == Backend::cpu) prefer_huge_pages(tensors.output, result_bytes(step));
  step.kernel->launch(step, tensors, stream);
}

void append_number(std::string& text, double value) {
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed, 1).ptr;
  text.append(buffer, end);
}

}  // namespace

std::string to_string(const Config& config) {
  std::string text;
  for (const int block : {config.block_m, config.block_n, config.block_k}) {
    if (block == 0) continue;
    if (!text.empty()) text += 'x';
    text += std::to_string(block);
  }
  for (const auto& [letter, value] : {std::pair{'s', config.stages}, {'w', config.warps}, {'k', config.split}}) {
    if (value == 0) continue;
    if (!text.empty()) text += ',';
    text += letter + std::to_string(value);
  }
  if (config.tile_w > 0) text += ",t" + std::to_string(config.tile_h) + "x" + std::to_string(config.tile_w);
  if (config.weight_stages > 0) text += ",b" + std::to_string(config.weight_stages);
  return text.empty() ? "default" : text;
}

Plan make_plan(const Problem& problem, const Epilogue& epilogue, const Device& device, std::string_view only,
               std::span<const Kernel* const> kernels) {
  validate(problem);
  validate(epilogue, problem);
  return Planner(problem, epilogue, device, only, kernels).make();
}

std::shared_ptr<const Plan> plan(const Problem& problem, const Epilogue& epilogue, const Device& device,
                                 std::string_view only) {
  const std::size_t key = key_of(problem, epilogue, device, only);
  {
    std::shared_lock lock(cache().mutex);
    if (auto found = find(key, problem, epilogue, device, only)) return found;
  }
  const PlanRequest request{problem, epilogue, device, std::string(only)};
  return plans({&request, 1})[0];
}

std::vector<std::shared_ptr<const Plan>> plans(std::span<const PlanRequest> requests) {
  std::vector<std::shared_ptr<const Plan>> result(requests.size());
  std::vector<std::shared_ptr<Plan>> made(requests.size());
  const auto make = [&](std::size_t i) {
    const PlanRequest& r = requests[i];
    made[i] = std::make_shared<Plan>(make_plan(r.problem, r.epilogue, r.device, r.only, kernels(r.device.backend)));
  };
  std::vector<std::size_t> keys, missing;
  for (const PlanRequest& r : requests) keys.push_back(key_of(r.problem, r.epilogue, r.device, r.only));
  {
    std::shared_lock lock(cache().mutex);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const PlanRequest& r = requests[i];
      result[i] = find(keys[i], r.problem, r.epilogue, r.device, r.only);
      if (!result[i]) missing.push_back(i);
    }
  }
  if (missing.empty()) return result;
  // Made without the lock, because preparing may compile for a second; two threads may make the same plan, one is kept.
  std::vector<std::future<void>> others;
  for (std::size_t k = 1; k < missing.size(); ++k) others.push_back(std::async(std::launch::async, make, missing[k]));
  make(missing[0]);
  for (std::future<void>& other : others) other.get();
  std::vector<Step*> steps;
  for (const std::size_t i : missing) {
    const Device& device = requests[i].device;
    if (device.backend == Backend::cuda && device.index < 0) continue;  // only described, nothing runs there
    for (Step& step : made[i]->steps)
      if (step.kernel->prepare != nullptr) steps.push_back(&step);
  }
  cuda::load_all(steps);
  for (Step* step : steps) step->kernel->prepare(*step);
  std::unique_lock lock(cache().mutex);
  for (const std::size_t i : missing) {
    const PlanRequest& r = requests[i];
    result[i] = find(keys[i], r.problem, r.epilogue, r.device, r.only);
    if (result[i]) continue;
    // Callers with ever-changing sizes must not grow the cache without bound; running plans keep themselves alive.
    if (cache().entries.size() >= kMaxCachedPlans) cache().entries.clear();
    cache().entries.emplace(keys[i], Entry{r.only, made[i]});
    result[i] = made[i];
  }
  return result;
}

void clear_plan_cache() {
  std::unique_lock lock(cache().mutex);
  cache().entries.clear();
}

std::string explain(const Plan& plan) {
  std::string text = to_string(plan.problem, plan.epilogue) + "\non " + plan.device.name + ": ";
  if (plan.steps.empty()) return text + "nothing to do, the result has no elements\n";
  append_number(text, plan.microseconds);
  text += " us predicted, " + std::to_string(plan.workspace_bytes) + " bytes of workspace\n";
  for (const Step& step : plan.steps) {
    text += "  step ";
    text.append(step.kernel->name) += ":" + to_string(step.config) + " ";
    append_number(text, step.microseconds);
    text += " us: " + to_string(step.problem, step.epilogue) + "\n";
  }
  std::vector<const Candidate*> order;
  for (const Candidate& candidate : plan.candidates) order.push_back(&candidate);
  std::stable_sort(order.begin(), order.end(), [](const Candidate* x, const Candidate* y) {
    if (x->chosen != y->chosen) return x->chosen;
    if (bool(x->fit) != bool(y->fit)) return bool(x->fit);
    return x->fit && x->fit.microseconds < y->fit.microseconds;
  });
  for (std::size_t i = 0; i < order.size(); ++i) {
    const Candidate& candidate = *order[i];
    if (candidate.fit) {
      text += candidate.chosen ? "  chosen  " : "  fits    ";
      text += candidate.kernel + ":" + to_string(candidate.config) + " ";
      append_number(text, candidate.fit.microseconds);
      text += " us, fuses " + std::to_string(candidate.fit.fused_ops) + " of " +
              std::to_string(plan.epilogue.ops.size()) + " operations" +
              (candidate.measured ? ", measured as the best\n" : "\n");
      continue;
    }
    // One line for all configs that are refused in the same words.
    const auto same = [&](std::size_t j) {
      return order[j]->kernel == candidate.kernel && order[j]->fit.refusal == candidate.fit.refusal;
    };
    bool first = true;
    for (std::size_t j = 0; j < i; ++j) first = first && !same(j);
    if (!first) continue;
    bool others = false, only_refusal = true;
    for (std::size_t j = 0; j < order.size(); ++j) {
      if (order[j]->kernel != candidate.kernel || j == i) continue;
      others = true;
      only_refusal = only_refusal && same(j);
    }
    text += "  refuses " + candidate.kernel + (others && !only_refusal ? ":" + to_string(candidate.config) : "") +
            ": " + candidate.fit.refusal + "\n";
  }
  return text;
}

void execute(const Plan& plan, const Tensors& tensors, Stream stream) {
  if (plan.device.backend == Backend::cuda && plan.device.index < 0) {
    throw std::runtime_error("a plan for " + plan.device.name + ", a hand-written device, cannot be run");
  }
  if (tensors.weight_channels_last && plan.device.backend != Backend::cuda) {
    throw std::invalid_argument("weight_channels_last is set; on the CPU weights are contiguous");
  }
  std::byte* workspace = static_cast<std::byte*>(tensors.workspace);
  std::optional<Buffer> own;
  if (plan.workspace_bytes > 0 && workspace == nullptr) {
    if (plan.device.backend != Backend::cpu) {
      throw std::invalid_argument("workspace is null; the plan needs " + std::to_string(plan.workspace_bytes) +
                                  " bytes on the device");
    }
    workspace = static_cast<std::byte*>(own.emplace(plan.workspace_bytes).data());
  }
  if (plan.steps.size() == 1) {
    const Step& step = plan.steps.front();
    Tensors view = tensors;
    view.workspace = step.workspace_bytes > 0 ? workspace + step.workspace_offset : nullptr;
    launch(step, view, stream);
    return;
  }
  void* raw = plan.raw_offset != Plan::npos ? workspace + plan.raw_offset
              : plan.epilogue.save          ? tensors.raw
                                            : tensors.output;
  if (plan.finish_step >= 0 && raw == nullptr) {
    throw std::invalid_argument("raw is null; a plan with `save` keeps the convolution's result there");
  }
  for (int index = 0; index < static_cast<int>(plan.steps.size()); ++index) {
    const Step& step = plan.steps[static_cast<std::size_t>(index)];
    Tensors view = tensors;
    view.workspace = step.workspace_bytes > 0 ? workspace + step.workspace_offset : nullptr;
    if (index == plan.pre_step) {
      view.output = workspace + plan.pre_offset;
      view.operands = {};
    } else if (index == plan.conv_step) {
      if (plan.pre_step >= 0) view.input = workspace + plan.pre_offset;
      if (plan.finish_step >= 0) view.output = raw;
    } else {
      view.input = raw;
      std::copy(tensors.operands.begin() + step.first_operand, tensors.operands.end(), view.operands.begin());
    }
    launch(step, view, stream);
  }
}

}  // namespace tconv
