// The pairs of tokens and experts in the order of their experts, in tiles of TILE rows.
//
// group_count: each block counts the pairs of its part, and notes the number of each pair among those
// of its expert there. group_place: from the counts of all blocks, where each expert's rows begin, and
// so the row of each pair; then the experts of all rows. A single block does both in one kernel (ALONE).
//
// Pairs of an expert are numbered in whatever order the threads come; a row's result does not depend
// on the rows beside it, so no result depends on that order.

constexpr int THREADS = 1024, MOST = 1024;  // experts; PART pairs to a block, TILE, ALONE are given

#ifndef EMULATED
__device__ __forceinline__ int shifted_up(int x, int by) { return __shfl_up_sync(~0u, x, by); }
#endif

// In place: the sums up to and with each of MOST numbers, one a thread. warps: room for 32.
__device__ __forceinline__ int scanned(int x, int* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int by = 1; by < 32; by *= 2) {
    const int other = shifted_up(x, by);
    if (lane >= by) x += other;
  }
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  if (warp == 0) {
    int sum = warps[lane];
    for (int by = 1; by < 32; by *= 2) {
      const int other = shifted_up(sum, by);
      if (lane >= by) sum += other;
    }
    warps[lane] = sum;
  }
  __syncthreads();
  return warp ? x + warps[warp - 1] : x;
}

// Numbers of a block's pairs among those of their experts, to `rows`; count: of each expert.
__device__ __forceinline__ void number(const int* experts, int* rows, int* count, int pairs, int E) {
  if (threadIdx.x < E) count[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < PART; i += THREADS) {
    const int pair = blockIdx.x * PART + i, expert = pair < pairs ? experts[pair] : -1;
    if (expert >= 0) rows[pair] = atomicAdd(&count[expert], 1);
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS)
    group_count(const int* experts, int* counts, int* rows, int pairs, int E) {
  __shared__ int count[MOST];
  number(experts, rows, count, pairs, E);
  if (threadIdx.x < E) counts[blockIdx.x * E + threadIdx.x] = count[threadIdx.x];
}

// counts: [blocks, E]; room: rows in all. Rows without an expert have -1 in row_experts.
extern "C" __global__ void __launch_bounds__(THREADS)
    group_place(const int* experts, const int* counts, int* rows, int* row_experts, int* row_pairs,
                int pairs, int E, int room, int blocks) {
  __shared__ int count[MOST], begin[MOST], place[MOST], warps[32];
  const int thread = threadIdx.x;
  if (ALONE) number(experts, rows, count, pairs, E);
  int before = 0, total = 0;
  if (thread < E) {
    if (ALONE) total = count[thread];
    for (int block = 0; !ALONE && block < blocks; block++) {
      const int some = counts[block * E + thread];
      before += block < blockIdx.x ? some : 0, total += some;
    }
  }
  const int padded = (total + TILE - 1) / TILE * TILE, end = scanned(padded, warps);
  if (thread < E) {
    count[thread] = total, begin[thread] = end - padded, place[thread] = end - padded + before;
  }
  __syncthreads();
  for (int i = thread; i < PART; i += THREADS) {
    const int pair = blockIdx.x * PART + i;
    if (pair >= pairs) break;
    const int expert = experts[pair];
    if (expert >= 0) {
      const int row = place[expert] + rows[pair];
      rows[pair] = row, row_pairs[row] = pair;
    } else {
      rows[pair] = -1;
    }
  }
  // A warp for each expert's rows, and all threads for those behind the last.
  const int lane = thread % 32, warp = blockIdx.x * 32 + thread / 32;
  for (int expert = warp; expert < E; expert += 32 * blocks) {
    const int filled = begin[expert] + count[expert];
    const int stop = (filled + TILE - 1) / TILE * TILE;  // where each expert's rows begin is aligned
    for (int row = begin[expert] + lane; row < stop; row += 32) {
      row_experts[row] = row < filled ? expert : -1;
    }
  }
  const int last = begin[E - 1] + (count[E - 1] + TILE - 1) / TILE * TILE;
  for (int row = last + blockIdx.x * THREADS + thread; row < room; row += blocks * THREADS) {
    row_experts[row] = -1;
  }
}
