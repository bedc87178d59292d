// box_gemm_pack — copies of input and grad_output in which a tap of box_gemm_grad_weight_sm90 is a shift.
// Computes  input_packed[group][ci], grad_packed[group][class][(t_w, co)] at position k = ((b D' + j_d) H' + j_h) W' + i_w
// Method    a class is a residue of the rows and slabs that taps reach modulo the stride: row j of class r is row
//           s (j + q) + r of grad_output with the lowest q of all taps, and its columns are those of one width tap each. A
//           block stages all columns that 64 positions (BP_ROWS rows of BP_TW) need of a lot of channels, as wide as they
//           can be read, and writes every width tap from there. An element at a time, 25 million took 137 us on an H100,
//           bound by instructions and by few bytes on their way. fp32 is rounded to TF32. Zeros where a tensor ends.
// Reads as  1 locate · 2 load · 5 store
// SPDX-License-Identifier: Apache-2.0
#include "mma_sm80.cuh"

struct PackSide {
  const storage_t* from;
  void* to;
  long long image, channel;  // elements between images, and between channels or positions
  long long pitch;           // elements between channels (positions innermost) or positions of the copy
  int size[3];               // of the tensor
  int wide;                  // rows (contiguous) or lots of channels can be read by 16 bytes
  unsigned blocks;
};
struct PackArgs {
  PackSide input, grad;
  int extent[3];  // D', H', W'
  int width;      // of the input
  int rows, strips;
};

__constant__ int bw_class[] = {BW_CLASS};              // [class] -> first depth, first height
__constant__ int bw_fold_offset[] = {BW_FOLD_OFFSET};  // [width tap] -> column of the first position

template <bool kGrad>
struct Packing {
  static constexpr int kClasses = kGrad ? BW_CLASSES : 1, kFold = kGrad ? BW_FOLD : 1;
  // A single channel lies as in a contiguous tensor.
  static constexpr bool kLast = TCONV_CHANNELS_LAST && (kGrad ? TCONV_CO : TCONV_CI) * TCONV_GROUPS > 1;
  static constexpr int kSource = kGrad ? TCONV_CO : TCONV_CI, kLot = kGrad ? BP_GRAD_LOT : BP_INPUT_LOT;
  static constexpr int kLots = (kSource + kLot - 1) / kLot;
  static constexpr int kStepD = kGrad ? TCONV_S0 : 1, kStepH = kGrad ? TCONV_S1 : 1, kStepW = kGrad ? TCONV_S2 : 1;
  static constexpr int kPitch = kGrad ? BW_CLASS_PITCH : BW_INPUT_PITCH, kLow = kGrad ? BP_LOW : 0;
  static constexpr int kPerUnit = 16 / sizeof(storage_t), kPerWord = 4 / sizeof(storage_t);
  // Staged columns of a row. Contiguous: from a multiple of a unit on, so that a row has whole units.
  static constexpr int kReach = kStepW * (BP_TW - 1) + (kGrad ? BP_REACH : 0) + 1;
  static constexpr int kColumns = kLast ? kReach : (kReach + kPerUnit - 1 + kPerUnit - 1) / kPerUnit * kPerUnit;
  // Elements between channels (contiguous) or columns (channels_last). Contiguous: 1 more word than a multiple of 4, so
  // that four units of 8 channels at 8 neighbouring positions lie in different banks.
  static constexpr int kStride =
      kLast ? kLot + kPerWord : (BP_ROWS * kColumns / kPerWord + 3) / 4 * 4 * kPerWord + kPerWord;
  static constexpr int kElements = kLast ? BP_ROWS * kColumns * kStride : kLot * kStride;
  static_assert(kElements * sizeof(storage_t) <= BP_SHARED);

  static __device__ __forceinline__ int staged(int row, int column, int channel) {
    return kLast ? (row * kColumns + column) * kStride + channel : channel * kStride + row * kColumns + column;
  }

  // kWide: a unit of kPerUnit elements at a time, all inside or all outside.
  template <bool kWide>
  static __device__ __forceinline__ void load(const PackSide& side, storage_t* tile, const long long* row_offset,
                                              int w0, int channel0, int channels) {
    constexpr int kPer = kWide ? kPerUnit : 1;
    constexpr int kFast = (kLast ? kLot : kColumns) / kPer, kSlow = kLast ? kColumns : kLot;
    constexpr int kAll = kFast * kSlow * BP_ROWS, kTurns = (kAll + 255) / 256;
#pragma unroll 4
    for (int turn = 0; turn < kTurns; ++turn) {
      const int i = turn * 256 + threadIdx.x;
      if (kAll % 256 != 0 && i >= kAll) break;
      const int fast = i % kFast * kPer, row = i / kFast % BP_ROWS, slow = i / (kFast * BP_ROWS);
      const int column = kLast ? slow : fast, channel = kLast ? fast : slow;
      const int w = w0 + column;
      const long long offset = row_offset[row];
      const bool inside = offset >= 0 && (unsigned)w < (unsigned)side.size[2] && channel < channels;
      const storage_t* from = side.from + (inside ? offset + (kLast ? w * side.channel + channel0 + channel
                                                                    : (channel0 + channel) * side.channel + w)
                                                  : 0);
      storage_t* const to = tile + staged(row, column, channel);
      if constexpr (kWide) {
        const uint4 unit = inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
        unsigned* const words = reinterpret_cast<unsigned*>(to);
        words[0] = unit.x, words[1] = unit.y, words[2] = unit.z, words[3] = unit.w;
      } else {
        *to = inside ? *from : storage_t();
      }
    }
  }

  static __device__ __forceinline__ void run(const PackArgs& a, const PackSide& side, storage_t* tile,
                                             long long* row_offset, unsigned first, unsigned step) {
    for (unsigned index = first; index < side.blocks; index += step) {
      // 1 locate
      unsigned rest = index;
      const int c0 = rest % kLots * kLot;
      rest /= kLots;
      const int kind = rest % kClasses;
      rest /= kClasses;
      const int group = rest % TCONV_GROUPS;
      rest /= TCONV_GROUPS;
      const int i0 = rest % a.strips * BP_TW, row0 = rest / a.strips * BP_ROWS;
      const int channels = min(kLot, kSource - c0);
      if (threadIdx.x < BP_ROWS) {
        const int row = row0 + threadIdx.x;
        const int d = row / a.extent[1] % a.extent[0] * kStepD + (kGrad ? bw_class[kind * 2] : 0);
        const int h = row % a.extent[1] * kStepH + (kGrad ? bw_class[kind * 2 + 1] : 0);
        const bool inside =
            row < a.rows && (unsigned)d < (unsigned)side.size[0] && (unsigned)h < (unsigned)side.size[1];
        row_offset[threadIdx.x] =
            inside ? row / (a.extent[1] * a.extent[0]) * side.image +
                         ((long long)d * side.size[1] + h) * side.size[2] * (kLast ? side.channel : 1)
                   : -1;
      }
      __syncthreads();

      // 2 load
      const int start = i0 * kStepW + kLow;
      const int skip = kLast ? 0 : start & (kPerUnit - 1);  // also of negative starts
      if (side.wide)
        load<true>(side, tile, row_offset, start - skip, group * kSource + c0, channels);
      else
        load<false>(side, tile, row_offset, start - skip, group * kSource + c0, channels);
      __syncthreads();

      // 5 store
      auto value = [&](int p, int t, int channel) {
        const int i_w = p % BP_TW;
        const int column = i_w * kStepW + (kGrad ? bw_fold_offset[t] - kLow : 0) + skip;
        storage_t x = tile[staged(p / BP_TW, column, channel)];
        if (i0 + i_w >= a.width) x = storage_t();
        return x;
      };
      auto position = [&](int p) { return static_cast<long long>(row0 + p / BP_TW) * a.extent[2] + i0 + p % BP_TW; };
      auto exists = [&](int p) { return row0 + p / BP_TW < a.rows && i0 + p % BP_TW < a.extent[2]; };
      const long long base = (long long)(group * kClasses + kind) * kPitch;
#if BW_POSITIONS_INNER
      const int p = threadIdx.x % 64;
      storage_t* const to = static_cast<storage_t*>(side.to) + base * side.pitch + position(p);
      if (exists(p)) {
#pragma unroll 4
        for (int i = threadIdx.x / 64; i < kFold * kLot; i += 4) {
          const int t = i / kLot, channel = i % kLot;
          if (channel < channels) {
#if TCONV_DTYPE_f32
            to[(t * kSource + c0 + channel) * side.pitch] = __uint_as_float(to_tf32(value(p, t, channel)));
#endif
          }
        }
      }
#else
      storage_t* const to = static_cast<storage_t*>(side.to) + base;
      if constexpr (kSource % 8 == 0 || kLots == 1) {
        // Units of 8 channels: of one tap, or across taps where a lot has all channels.
        constexpr bool kAcross = kSource % 8 != 0;
        constexpr int kUnits = kAcross ? kPitch / 8 : kLot / 8, kBatches = kAcross ? 1 : kFold;
        constexpr int kSide = kUnits % 4 == 0 ? 4 : kUnits % 2 == 0 ? 2 : 1;  // units that neighbouring lanes take
#pragma unroll 1
        for (int t = 0; t < kBatches; ++t)
#pragma unroll 2
          for (int i = threadIdx.x; i < kUnits * 64; i += 256) {
            const int unit = i / (64 * kSide) * kSide + i % kSide, p = i / kSide % 64;
            if (!exists(p) || (!kAcross && unit * 8 >= channels)) continue;
            storage_t item[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) {
              const int c = unit * 8 + e;
              item[e] = kAcross && c >= kFold * kSource ? storage_t()
                        : kAcross                       ? value(p, c / kSource, c % kSource)
                                                        : value(p, t, c);
            }
            store_16(to + position(p) * side.pitch + (kAcross ? 0 : t * kSource + c0) + unit * 8, unit_of(item));
          }
      } else {
        for (int i = threadIdx.x; i < kFold * kLot * 64; i += 256) {
          const int channel = i % kLot, p = i / kLot % 64, t = i / (kLot * 64);
          if (exists(p) && channel < channels)
            to[position(p) * side.pitch + t * kSource + c0 + channel] = value(p, t, channel);
        }
        if (c0 == 0)  // channels up to a whole unit
          for (int i = threadIdx.x; i < (kPitch - kFold * kSource) * 64; i += 256)
            if (exists(i % 64)) to[position(i % 64) * side.pitch + kFold * kSource + i / 64] = storage_t();
      }
#endif
      __syncthreads();
    }
  }
};

extern "C" __global__ void __launch_bounds__(256, 3) box_gemm_pack(const PackArgs a, unsigned input_grid) {
  extern __shared__ __align__(128) uint4 shared[];
  storage_t* const tile = reinterpret_cast<storage_t*>(shared);
  __shared__ long long row_offset[BP_ROWS];
  if (blockIdx.x < input_grid)
    Packing<false>::run(a, a.input, tile, row_offset, blockIdx.x, input_grid);
  else
    Packing<true>::run(a, a.grad, tile, row_offset, blockIdx.x - input_grid, gridDim.x - input_grid);
}
