// phase_gemm_grad_weight — weight gradients as products of staged planes along the positions.
//
// Computes  grad_weight and grad_bias, any rank, parameters, groups, dtype and layout; the pre-activation of the input.
// Method    grad_output is staged as for grad_input, split by stride phase; the input over the same grid. A register tile
//           of 4 x 4 channel pairs runs along the positions in vectors; the lanes are added at the end of each tile and
//           tap. Tiles belong to at most 32 parts that depend on the problem only; parts are added in order, in double.
// Refuses   Other directions; targets above the machine's.
// Reads as  phase_gemm.h states the formulation, phase_gemm_driver.cpp chooses tiles and parts.
// SPDX-License-Identifier: Apache-2.0
#include "cpu/grad_bias_rows.h"
#include "cpu/planes.h"

namespace tconv::cpu {
namespace {

// Channels of grad_output in a register tile of 4 input channels. 16 registers hold 12 sums, 3 vectors and one of the other
// side; with 4 by 4 sums two of them lived in memory, a chain of loads and stores longer than the products.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostJ = 4;
#else
constexpr int kMostJ = 3;
#endif

// sums[i][j] = sum over positions of x[i][q] * g[j][q]. Masked: pairs count only where both masks are not zero.
template <class S, int I, int J, bool Masked>
void pair_sums(const S* x, const S* g, int64_t pitch, int64_t vectors, const S* x_mask, const S* g_mask, S* sums) {
  constexpr int kChains = I * J >= 8 ? 1 : I * J >= 4 ? 2 : 4;  // enough independent sums to hide the FMA's latency
  Vec<S> sum[kChains][I][J] = {};
  auto step = [&](int chain, int64_t at) __attribute__((always_inline)) {
    Vec<S> right[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) right[j] = load(g + j * pitch + at);
#pragma GCC unroll 4
    for (int i = 0; i < I; ++i) {
      const Vec<S> left = load(x + i * pitch + at);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        if constexpr (Masked) {
          const Vec<S> both = load(x_mask + at) * load(g_mask + at);
          sum[chain][i][j] += both != 0 ? left * right[j] : Vec<S>{};
        } else {
          sum[chain][i][j] += left * right[j];
        }
      }
    }
  };
  int64_t v = 0;
  for (; v + kChains <= vectors; v += kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) step(chain, (v + chain) * kLanes<S>);
  }
  for (; v < vectors; ++v) step(0, v * kLanes<S>);
  constexpr int kGroup = kLanes<S>, kTotals = (I * J + kGroup - 1) / kGroup * kGroup;
  Vec<S> totals[kTotals] = {};
#pragma GCC unroll 4
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      Vec<S> total = sum[0][i][j];
#pragma GCC unroll 4
      for (int chain = 1; chain < kChains; ++chain) total += sum[chain][i][j];
      totals[i * J + j] = total;
    }
  if constexpr (I * J == 1) {
    sums[0] = reduce<S>(totals[0]);
  } else {
#pragma GCC unroll 16
    for (int first = 0; first < kTotals; first += kGroup) store(sums + first, reduce_all<S>(totals + first));
  }
}

template <class S>
using PairFunction = void (*)(const S*, const S*, int64_t, int64_t, const S*, const S*, S*);

template <class S, int I, bool Masked>
PairFunction<S> pair_function(int64_t j) {
  return j >= 3 ? pair_sums<S, I, kMostJ, Masked> : j == 2 ? pair_sums<S, I, 2, Masked> : pair_sums<S, I, 1, Masked>;
}
template <class S, bool Masked>
PairFunction<S> pair_function(int64_t i, int64_t j) {
  return i == 4   ? pair_function<S, 4, Masked>(j)
         : i == 2 ? pair_function<S, 2, Masked>(j)
                  : pair_function<S, 1, Masked>(j);
}

// One pair of channels: sums of as many taps as a vector has lanes, which read x once and are added across lanes together.
// Tap by tap two loads go with every product: 51 ms instead of 44 (AVX2, 3d g16 c16>16 i24x48x48 t5x5x5 s2 p2).
template <class S>
void tap_sums(const S* x, const S* g, const int64_t* offsets, int64_t taps, int64_t vectors, S* sums) {
  constexpr int kTaps = kLanes<S>;
  const S* at[kTaps];
  for (int t = 0; t < kTaps; ++t) at[t] = g + offsets[t < taps ? t : taps - 1];
  Vec<S> sum[kTaps] = {};
  for (int64_t v = 0; v < vectors * kLanes<S>; v += kLanes<S>) {
    const Vec<S> value = load(x + v);
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) sum[t] += value * load(at[t] + v);
  }
  store(sums, reduce_all<S>(sum));
}

int64_t block_of(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }
int64_t output_block_of(int64_t left) {
  if (left >= kMostJ && (kMostJ == 4 || left != 4)) return kMostJ;  // 4 = 2 + 2
  return left >= 2 ? 2 : 1;
}

template <class S>
struct Staged {
  S *planes, *mask, *line;
};

template <class S>
int64_t carve(const GradWeightTask& task, void* scratch, Staged<S>* x, Staged<S>* g) {
  const PhaseGemmTask& gradient = task.gradient;
  int64_t used = 0;
  auto take = [&](int64_t n) {
    S* p = scratch ? reinterpret_cast<S*>(static_cast<char*>(scratch) + used) : nullptr;
    used += round_up(n * static_cast<int64_t>(sizeof(S)), 64);
    return p;
  };
  constexpr int64_t kSlack = 4 * kLanes<S>;
  x->planes = take(gradient.m_chunk * gradient.plane_pitch + kSlack);
  x->mask = take(gradient.plane_pitch + kSlack);
  g->planes = take(gradient.num_planes * gradient.k * gradient.plane_pitch + kSlack);
  g->mask = take(gradient.num_planes * gradient.plane_pitch + kSlack);
  const int64_t channels = max_of(gradient.k, gradient.m_chunk);
  x->line = g->line = take(max_of(gradient.source_step[2] * (gradient.plane[2] + kLanes<S>), channels) + kSlack);
  return used;
}

// Zeros of the planes behind the staged part of each row, between the slices and up to the next plane.
template <class S>
void clear_margins(const PhaseGemmTask& task, const int64_t* tile, int64_t planes, S* data) {
  for (int64_t plane = 0; plane < planes; ++plane, data += task.plane_pitch) {
    for (int64_t d = 0; d < tile[0]; ++d) {
      S* slice = data + d * task.plane[1] * task.plane[2];
      for (int64_t h = 0; h < tile[1]; ++h) zero(slice + h * task.plane[2] + tile[2], task.plane[2] - tile[2]);
      zero(slice + tile[1] * task.plane[2], (task.plane[1] - tile[1]) * task.plane[2]);
    }
    const int64_t end = tile[0] * task.plane[1] * task.plane[2];
    zero(data + end, task.plane_pitch - end);
  }
  zero(data, 4 * kLanes<S>);
}

template <class S>
bool all_finite(const S* data, int64_t n) {
  Vec<S> sum{};
  for (int64_t i = 0; i < n; i += kLanes<S>) sum += load(data + i) * S(0);
  return reduce<S>(sum) == 0;
}

template <class S>
void run_typed(const GradWeightTask& task, int64_t item, void* scratch) {
  Staged<S> x, g;
  carve<S>(task, scratch, &x, &g);
  PhaseGemmTask gradient = task.gradient, input = task.input;
  const int64_t chunk = item % gradient.m_chunks, group = item / gradient.m_chunks % gradient.groups;
  const int64_t part = item / gradient.m_chunks / gradient.groups;
  const int64_t m0 = chunk * gradient.m_chunk, m_count = min_of(gradient.m_chunk, gradient.m - m0);
  const int64_t first = part * task.num_tiles / task.parts, last = (part + 1) * task.num_tiles / task.parts;
  S* partial = static_cast<S*>(task.partial) + part * task.weight_elements +
               (group * gradient.m + m0) * gradient.k * gradient.num_taps;
  zero(partial, m_count * gradient.k * gradient.num_taps);
  input.k = input.rows = m_count;
  const int64_t* tile = gradient.tile;
  const int64_t pitch = gradient.plane_pitch;
  const int64_t length = ((tile[0] - 1) * gradient.plane[1] + tile[1] - 1) * gradient.plane[2] + tile[2];
  const int64_t vectors = (length + kLanes<S> - 1) / kLanes<S>;
  for (int64_t at = first; at < last; ++at) {
    Place place{};
    int64_t rest = at;
    for (int dim = 2; dim >= 0; --dim) {
      place.q0[dim] = rest % gradient.tiles[dim] * tile[dim];
      place.n[dim] = tile[dim];  // whole tiles: both tensors are zero beyond their ends
      rest /= gradient.tiles[dim];
    }
    place.b = rest;
    auto stage = [&](bool masked) {
      gradient.masked = input.masked = masked;
      place.source_channel = group * gradient.k;
      stage_planes<S>(gradient, place, g);
      clear_margins(gradient, gradient.plane, gradient.num_planes * gradient.k, g.planes);
      place.source_channel = group * gradient.m + m0;
      stage_planes<S>(input, place, x);
      clear_margins(input, tile, m_count, x.planes);
      if (masked) clear_margins(gradient, gradient.plane, gradient.num_planes, g.mask);
      if (masked) clear_margins(input, tile, 1, x.mask);
    };
    stage(false);
    const bool masked =
        !all_finite(g.planes, gradient.num_planes * gradient.k * pitch) || !all_finite(x.planes, m_count * pitch);
    if (masked) stage(true);
    for (int64_t i = 0, ni; i < m_count; i += ni) {
      ni = block_of(m_count - i);
      for (int64_t j = 0, nj; j < gradient.k; j += nj) {
        nj = output_block_of(gradient.k - j);
        const PairFunction<S> pairs = masked ? pair_function<S, true>(ni, nj) : pair_function<S, false>(ni, nj);
        int64_t tap = 0;
        if (ni * nj == 1 && !masked)
          for (int64_t left; (left = gradient.num_taps - tap) > kLanes<S> / 2; tap += kLanes<S>) {
            S sums[kLanes<S>];
            const int64_t taps = min_of(left, kLanes<S>);
            tap_sums(x.planes + i * pitch, g.planes + j * pitch, gradient.tap_offset + tap, taps, vectors, sums);
            for (int64_t t = 0; t < taps; ++t)
              partial[(i * gradient.k + j) * gradient.num_taps + task.tap_order[tap + t]] += sums[t];
          }
        for (; tap < gradient.num_taps; ++tap) {
          S sums[16 + kLanes<S>];
          pairs(x.planes + i * pitch, g.planes + gradient.tap_offset[tap] + j * pitch, pitch, vectors, x.mask,
                g.mask + gradient.mask_offset[tap], sums);
          S* out = partial + (i * gradient.k + j) * gradient.num_taps + task.tap_order[tap];
          for (int64_t a = 0; a < ni; ++a)
            for (int64_t b = 0; b < nj; ++b) out[(a * gradient.k + b) * gradient.num_taps] += sums[a * nj + b];
        }
      }
    }
  }
}

template <class S>
void merge_typed(const GradWeightTask& task, int64_t first, int64_t last, void* result) {
  const S* partial = static_cast<const S*>(task.partial);
  S values[256 + kLanes<S>] = {};
  for (int64_t at = first; at < last; at += 256) {
    const int64_t n = min_of(256, last - at);
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t part = 0; part < task.parts; ++part) sum += partial[part * task.weight_elements + at + i];
      values[i] = static_cast<S>(sum);
    }
    store_row(values, result, task.gradient.dtype, at, n);
  }
}

bool is_double(const GradWeightTask& task) { return task.gradient.dtype == DType::f64; }

void run(const GradWeightTask& task, int64_t item, void* scratch) {
  is_double(task) ? run_typed<double>(task, item, scratch) : run_typed<float>(task, item, scratch);
}
int64_t scratch_bytes(const GradWeightTask& task) {
  Staged<double> x, g;
  Staged<float> xf, gf;
  return is_double(task) ? carve<double>(task, nullptr, &x, &g) : carve<float>(task, nullptr, &xf, &gf);
}
void merge(const GradWeightTask& task, int64_t first, int64_t last, void* result) {
  is_double(task) ? merge_typed<double>(task, first, last, result) : merge_typed<float>(task, first, last, result);
}

constexpr GradWeightLoops kLoops = {Isa::TCONV_TARGET, run, scratch_bytes, merge, sum_bias};

Fit fit(const Problem& problem, const Epilogue& epilogue, const Device& device, const Config&) {
  return fit_grad_weight(problem, epilogue, device, Isa::TCONV_TARGET);
}
void prepare(Step& step) { prepare_grad_weight(step, Isa::TCONV_TARGET); }
void launch(const Step& step, const Tensors& tensors, Stream stream) {
  launch_grad_weight(step, tensors, stream, kLoops);
}

constexpr Config kConfigs[] = {{}};

}  // namespace

#define TCONV_NAME_OF(name) #name
#define TCONV_NAME(name) TCONV_NAME_OF(name)
extern const Kernel TCONV_KERNEL;
const Kernel TCONV_KERNEL = {TCONV_NAME(TCONV_KERNEL), kConfigs, fit, nullptr, prepare, launch};

}  // namespace tconv::cpu
