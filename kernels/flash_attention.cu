// FlashAttention-2: O = softmax(Q K^T * scale) V and its gradients, with no N x N matrix in memory.
//
// Tri Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023. The
// names are the paper's: a block owns Br queries and walks over the keys, Bc at a time; S are the scores of
// such a tile, m and l the running maximum and sum of a row, P = exp(S - m), O the output, L the logsumexp.
//
// One text for float, half and bfloat16. A warp owns 16 rows of a tile. Each product of two tiles is one of
// two functions, S += A B^T and O += P B, and exists twice: in scalar arithmetic for float, to be read first,
// and on the tensor cores for the two others. Everything else is the same.
#include "ptx.cuh"

constexpr int WARP = 32, WARP_ROWS = 16;

__device__ float minus_infinity() { return __int_as_float(0xff800000); }
__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Where the rows of a tensor (batch, heads, length, d) lie, in elements. The numbers of a row are neighbours.
struct Strides {
    long long batch, head, row;
};

// What all blocks of a launch share. `group` query heads use one key head.
// Query i stands at position i + keys - queries, and sees the keys from `left` before to `right` after it.
struct Problem {
    int heads, group, queries, keys, left, right;
    float scale;
    Strides Q, K, V, O, dO, dQ, dK, dV;
};

// ------------------------------------------------------------------------------------------ what sees what

struct Range {
    int begin, end;
    __device__ bool contains(int i) const { return begin <= i && i < end; }
};

// All masks are one rule. `length` is the number of keys of this sequence, without its padding.
struct Mask {
    int queries, keys, length, left, right;

    __device__ Mask(const Problem& p, const int* lengths, int batch)
        : queries(p.queries), keys(p.keys), length(p.keys), left(p.left), right(p.right) {
        if (lengths) length = max(0, min(lengths[batch], p.keys));
    }
    __device__ Range keys_of(int query) const {
        const int position = query + keys - queries;
        return {max(0, position - left), max(0, min(length, position + right + 1))};
    }
    __device__ Range queries_of(int key) const {
        if (key >= length) return {queries, 0};  // padding: nobody sees it
        const int query = key - (keys - queries);
        return {max(0, query - right), max(0, min(queries, query + left + 1))};
    }
};

// Both ends of the ranges above grow with the row, so the first and the last row of a tile tell of all.
__device__ bool sees_any(Range first, Range last, int begin, int size) {
    return first.begin < begin + size && begin < last.end;
}
__device__ bool sees_all(Range first, Range last, int begin, int size) {
    return last.begin <= begin && begin + size <= first.end;
}

// --------------------------------------------------------------------------------- tiles in shared memory

// rows x d numbers. A row is cut in chunks of 16 bytes, and row r keeps its chunk c in place c ^ f(r): the
// eight chunks that a warp reads at once from a column of a tile then lie in eight different groups of banks.
template <class T, int d>
struct Tile {
    static constexpr int per_chunk = 16 / sizeof(T), chunks = d / per_chunk;
    T* data;

    __device__ T* at(int row, int column) const {
        const int swizzle = chunks % 8 == 0 ? row & 7 : row >> 1 & 3;
        return data + (row * chunks + (column / per_chunk ^ swizzle)) * per_chunk + column % per_chunk;
    }
};

// Start copying `count` rows from global memory; the other rows of the tile become zeros. All threads help.
template <int rows, class T, int d>
__device__ void start_loading(Tile<T, d> tile, const T* source, long long stride, int count) {
    constexpr int chunks = Tile<T, d>::chunks, width = Tile<T, d>::per_chunk;
    for (int i = threadIdx.x; i < rows * chunks; i += blockDim.x) {
        const int row = i / chunks, column = i % chunks * width;
        const bool inside = row < count;
        copy_async<16>(tile.at(row, column), source + (inside ? row * stride + column : 0), inside);
    }
}

// -------------------------------------------------------------------------------- products of two tiles

// The 16 x 8n numbers of a warp lie in its registers as the tensor cores want them: with g = lane / 4 and
// t = lane % 4, a thread holds x[j][0], x[j][1] of row g and x[j][2], x[j][3] of row g + 8, in the columns
// 8j + 2t and 8j + 2t + 1.
__device__ int lane_row() { return threadIdx.x % WARP / 4; }
__device__ int lane_column() { return threadIdx.x % 4 * 2; }

// S += A B^T: 16 rows of A, from `row` on, times 8n rows of B.
template <int n, int d>
__device__ void add_product_transposed(float (&S)[n][4], Tile<float, d> A, int row, Tile<float, d> B) {
#pragma unroll 4
    for (int c = 0; c < d; c += 4) {
        const float4 a0 = *(const float4*)A.at(row + lane_row(), c);
        const float4 a1 = *(const float4*)A.at(row + lane_row() + 8, c);
#pragma unroll
        for (int j = 0; j < n; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float4 b = *(const float4*)B.at(8 * j + lane_column() + e, c);
                S[j][e] += a0.x * b.x + a0.y * b.y + a0.z * b.z + a0.w * b.w;
                S[j][2 + e] += a1.x * b.x + a1.y * b.y + a1.z * b.z + a1.w * b.w;
            }
        }
    }
}

// O += P B: 16 x 8n numbers of P times 8n rows of B. Four threads share a row of P, and tell each other.
template <int n, int d>
__device__ void add_product(float (&O)[d / 8][4], const float (&P)[n][4], Tile<float, d> B) {
#pragma unroll 1
    for (int t = 0; t < 4; ++t) {
        const int owner = threadIdx.x % WARP / 4 * 4 + t;  // the lane with columns 8j + 2t and + 1 of my rows
#pragma unroll
        for (int j = 0; j < n; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float p0 = __shfl_sync(0xffffffff, P[j][e], owner);
                const float p1 = __shfl_sync(0xffffffff, P[j][2 + e], owner);
#pragma unroll
                for (int c = 0; c < d / 8; ++c) {
                    const float2 b = *(const float2*)B.at(8 * j + 2 * t + e, 8 * c + lane_column());
                    O[c][0] += p0 * b.x;
                    O[c][1] += p0 * b.y;
                    O[c][2] += p1 * b.x;
                    O[c][3] += p1 * b.y;
                }
            }
        }
    }
}

// The same two on the tensor cores, 16 x 16 times 16 x 8 at a time (see ptx.cuh).
template <class T, int n, int d>
__device__ void add_product_transposed(float (&S)[n][4], Tile<T, d> A, int row, Tile<T, d> B) {
    static_assert(n % 2 == 0, "tensor cores take 16 rows of B at a time");
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int c = 0; c < d; c += 16) {
        unsigned a[4];
        load_matrices(a, A.at(row + lane % 16, c + lane / 16 * 8));
#pragma unroll
        for (int j = 0; j < n; j += 2) {
            unsigned b[4];
            load_matrices(b, B.at(8 * j + lane / 16 * 8 + lane % 8, c + lane / 8 % 2 * 8));
            multiply_add<T>(S[j], a, b[0], b[1]);
            multiply_add<T>(S[j + 1], a, b[2], b[3]);
        }
    }
}

template <class T, int n, int d>
__device__ void add_product(float (&O)[d / 8][4], const float (&P)[n][4], Tile<T, d> B) {
    static_assert(n % 2 == 0, "tensor cores take 16 rows of B at a time");
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int j = 0; j < n; j += 2) {
        // What one product leaves in the registers is, rounded to T, in place for the next.
        const unsigned a[4] = {pack<T>(P[j][0], P[j][1]), pack<T>(P[j][2], P[j][3]),
                               pack<T>(P[j + 1][0], P[j + 1][1]), pack<T>(P[j + 1][2], P[j + 1][3])};
#pragma unroll
        for (int c = 0; c < d / 8; c += 2) {
            unsigned b[4];
            load_matrices_transposed(b, B.at(8 * j + lane % 16, 8 * c + lane / 16 * 8));
            multiply_add<T>(O[c], a, b[0], b[1]);
            multiply_add<T>(O[c + 1], a, b[2], b[3]);
        }
    }
}

template <int n>
__device__ void clear(float (&x)[n][4]) {
#pragma unroll
    for (int i = 0; i < 4 * n; ++i) x[i / 4][i % 4] = 0;
}

// Write a warp's 16 x d numbers, times factor[0] in rows g and factor[1] in rows g + 8, to `count` rows of
// global memory. They pass through 16 rows of a tile that no other warp uses, to leave in 16-byte pieces.
template <class T, int d>
__device__ void store(T* target, long long stride, int count, const float (&x)[d / 8][4],
                      const float (&factor)[2], Tile<T, d> tile, int row) {
    __syncwarp();  // the whole warp has read what stood there
#pragma unroll
    for (int c = 0; c < d / 8; ++c) {
        const int column = 8 * c + lane_column();
        store_pair(tile.at(row + lane_row(), column), x[c][0] * factor[0], x[c][1] * factor[0]);
        store_pair(tile.at(row + lane_row() + 8, column), x[c][2] * factor[1], x[c][3] * factor[1]);
    }
    __syncwarp();
    constexpr int chunks = Tile<T, d>::chunks, width = Tile<T, d>::per_chunk;
    for (int i = threadIdx.x % WARP; i < WARP_ROWS * chunks; i += WARP) {
        const int r = row + i / chunks, column = i % chunks * width;
        if (r < count) *(uint4*)(target + r * stride + column) = *(const uint4*)tile.at(r, column);
    }
}

// The maximum and the sum of a row, over the four threads that hold it.
__device__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// ------------------------------------------------------------------------------------------ forward pass

// Algorithm 1. A block computes Br rows of O and L, a warp 16 of them.
template <class T, int d, int Br, int Bc>
__global__ void __launch_bounds__(Br / WARP_ROWS * WARP)
    forward(const T* Q, const T* K, const T* V, T* O_out, float* L, const int* lengths, Problem p) {
    extern __shared__ uint4 shared[];
    const int tiles = ceil_div(p.queries, Br), head = blockIdx.x / tiles % p.heads;
    const int batch = blockIdx.x / tiles / p.heads;
    // Under a causal mask the last queries see the most keys: the longest work starts first.
    const int i0 = (tiles - 1 - blockIdx.x % tiles) * Br, count = min(Br, p.queries - i0);
    Q += batch * p.Q.batch + head * p.Q.head + i0 * p.Q.row;
    K += batch * p.K.batch + head / p.group * p.K.head;
    V += batch * p.V.batch + head / p.group * p.V.head;
    O_out += batch * p.O.batch + head * p.O.head + i0 * p.O.row;
    L += ((long long)batch * p.heads + head) * p.queries + i0;

    // Two buffers of K and V: one is multiplied with while the next tile arrives in the other.
    const Tile<T, d> Qi{(T*)shared};
    const auto Kj = [&](int j) { return Tile<T, d>{Qi.data + (Br + j % 2 * 2 * Bc) * d}; };
    const auto Vj = [&](int j) { return Tile<T, d>{Kj(j).data + Bc * d}; };
    const auto start_loading_keys = [&](int j) {
        start_loading<Bc>(Kj(j), K + j * Bc * p.K.row, p.K.row, p.keys - j * Bc);
        start_loading<Bc>(Vj(j), V + j * Bc * p.V.row, p.V.row, p.keys - j * Bc);
    };

    const Mask mask(p, lengths, batch);
    const int first = mask.keys_of(i0).begin / Bc, last = ceil_div(mask.keys_of(i0 + count - 1).end, Bc);
    const int warp_row = threadIdx.x / WARP * WARP_ROWS;  // this warp's first row of the tile
    const Range top = mask.keys_of(i0 + warp_row);
    const Range bottom = mask.keys_of(i0 + min(warp_row + WARP_ROWS, count) - 1);
    const Range sees[2] = {mask.keys_of(i0 + warp_row + lane_row()),
                           mask.keys_of(i0 + warp_row + lane_row() + 8)};

    // Line 5: O = 0, l = 0, m = -inf. m is the maximum of S * scale; l here of this thread's columns only.
    float O[d / 8][4], m[2] = {minus_infinity(), minus_infinity()}, l[2] = {0, 0};
    clear(O);

    if (first < last) {
        start_loading<Br>(Qi, Q, p.Q.row, count);  // line 4
        start_loading_keys(first);
    }
    for (int j = first; j < last; ++j) {  // line 6
        wait_for_copies();
        __syncthreads();  // tile j is there, for all, and nobody reads tile j - 1 any more
        if (j + 1 < last) start_loading_keys(j + 1);  // line 7
        if (warp_row >= count || !sees_any(top, bottom, j * Bc, Bc)) continue;

        float S[Bc / 8][4];  // line 8: S = Q K^T
        clear(S);
        add_product_transposed(S, Qi, warp_row, Kj(j));
        if (!sees_all(top, bottom, j * Bc, Bc)) {
#pragma unroll
            for (int n = 0; n < Bc / 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int key = j * Bc + 8 * n + lane_column() + e % 2;
                    if (!sees[e / 2].contains(key)) S[n][e] = minus_infinity();
                }
            }
        }

#pragma unroll
        for (int r = 0; r < 2; ++r) {  // line 9, for the rows g and g + 8
            float highest = minus_infinity();
#pragma unroll
            for (int n = 0; n < Bc / 8; ++n) highest = fmaxf(highest, fmaxf(S[n][2 * r], S[n][2 * r + 1]));
            const float m_new = fmaxf(m[r], row_max(highest) * p.scale);
            // A row that saw nothing yet must give P = exp(-inf - 0) = 0, not exp(-inf + inf).
            const float shift = m_new == minus_infinity() ? 0 : m_new;
            const float alpha = exponential<T>(m[r] - shift);
            m[r] = m_new;
            l[r] *= alpha;
#pragma unroll
            for (int n = 0; n < Bc / 8; ++n) {
#pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; ++e) {
                    S[n][e] = exponential<T>(S[n][e] * p.scale - shift);  // P
                    l[r] += S[n][e];
                }
            }
#pragma unroll
            for (int c = 0; c < d / 8; ++c) {  // line 10: O = O * exp(m_old - m) + P V
                O[c][2 * r] *= alpha;
                O[c][2 * r + 1] *= alpha;
            }
        }
        add_product(O, S, Vj(j));
    }

    float inverse[2];  // lines 12 and 13: O / l, and L = m + log(l)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        l[r] = row_sum(l[r]);
        inverse[r] = l[r] > 0 ? 1 / l[r] : 0;
        const int i = warp_row + lane_row() + 8 * r;
        if (i < count && lane_column() == 0) L[i] = m[r] + logf(l[r]);
    }
    store(O_out, p.O.row, count, O, inverse, Qi, warp_row);
}

// ----------------------------------------------------------------------------------------- backward pass

// D = rowsum(dO * O), line 4 of Algorithm 2: a warp computes one number.
template <class T, int d>
__global__ void row_dots(const T* dO, const T* O, float* D, int rows, Problem p) {
    const int row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const int i = row % p.queries, head = row / p.queries % p.heads, batch = row / p.queries / p.heads;
    dO += batch * p.dO.batch + head * p.dO.head + i * p.dO.row;
    O += batch * p.O.batch + head * p.O.head + i * p.O.row;
    float sum = 0;
#pragma unroll
    for (int c = lane; c < d; c += WARP) sum += float(dO[c]) * float(O[c]);
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane == 0) D[row] = sum;
}

// The algorithm's backward pass walks over tiles of keys and adds to dQ in global memory, from all blocks at
// once, in an order that changes from run to run. Two kernels instead of one compute S and dP twice, and need
// no such sum: in the first a block owns Br queries and walks over keys, in the second it owns Bc keys and
// walks over queries.
//
// L is rounded to float, and a row of P = exp(S - L) is off as a whole by as much as L: by |L| 2^-24. That is
// nothing beside the rounding of P to 16 bits, but in float it would be the largest error by far. There the
// first kernel sums each row of P, and both use P / rowsum(P).
template <class T>
constexpr bool divides_by_sum = sizeof(T) == sizeof(float);

// P = exp(Q K^T * scale - L),  dS = P * (dO V^T - D),  dQ = dS K * scale.
template <class T, int d, int Br, int Bc>
__global__ void __launch_bounds__(Br / WARP_ROWS * WARP)
    backward_queries(const T* dO, const T* Q, const T* K, const T* V, const float* L, const float* D,
                     T* dQ_out, float* R, const int* lengths, Problem p) {
    extern __shared__ uint4 shared[];
    const int tiles = ceil_div(p.queries, Br), head = blockIdx.x / tiles % p.heads;
    const int batch = blockIdx.x / tiles / p.heads;
    const int i0 = (tiles - 1 - blockIdx.x % tiles) * Br, count = min(Br, p.queries - i0);
    Q += batch * p.Q.batch + head * p.Q.head + i0 * p.Q.row;
    dO += batch * p.dO.batch + head * p.dO.head + i0 * p.dO.row;
    K += batch * p.K.batch + head / p.group * p.K.head;
    V += batch * p.V.batch + head / p.group * p.V.head;
    dQ_out += batch * p.dQ.batch + head * p.dQ.head + i0 * p.dQ.row;
    L += ((long long)batch * p.heads + head) * p.queries + i0;
    D += ((long long)batch * p.heads + head) * p.queries + i0;
    R += ((long long)batch * p.heads + head) * p.queries + i0;

    const Tile<T, d> Qi{(T*)shared}, dOi{Qi.data + Br * d};
    const auto Kj = [&](int j) { return Tile<T, d>{dOi.data + (Br + j % 2 * 2 * Bc) * d}; };
    const auto Vj = [&](int j) { return Tile<T, d>{Kj(j).data + Bc * d}; };
    const auto start_loading_keys = [&](int j) {
        start_loading<Bc>(Kj(j), K + j * Bc * p.K.row, p.K.row, p.keys - j * Bc);
        start_loading<Bc>(Vj(j), V + j * Bc * p.V.row, p.V.row, p.keys - j * Bc);
    };

    const Mask mask(p, lengths, batch);
    const int first = mask.keys_of(i0).begin / Bc, last = ceil_div(mask.keys_of(i0 + count - 1).end, Bc);
    const int warp_row = threadIdx.x / WARP * WARP_ROWS;
    const Range top = mask.keys_of(i0 + warp_row);
    const Range bottom = mask.keys_of(i0 + min(warp_row + WARP_ROWS, count) - 1);
    const Range sees[2] = {mask.keys_of(i0 + warp_row + lane_row()),
                           mask.keys_of(i0 + warp_row + lane_row() + 8)};

    float dQ[d / 8][4], l[2], delta[2], sum[2] = {0, 0};  // L, D and rowsum(P) of the rows g and g + 8
    clear(dQ);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int i = warp_row + lane_row() + 8 * r;
        l[r] = i < count ? L[i] : 0;
        delta[r] = i < count ? D[i] : 0;
    }
    if (first < last) {
        start_loading<Br>(Qi, Q, p.Q.row, count);
        start_loading<Br>(dOi, dO, p.dO.row, count);
        start_loading_keys(first);
    }
    for (int j = first; j < last; ++j) {
        wait_for_copies();
        __syncthreads();
        if (j + 1 < last) start_loading_keys(j + 1);
        if (warp_row >= count || !sees_any(top, bottom, j * Bc, Bc)) continue;
        const bool all = sees_all(top, bottom, j * Bc, Bc);

        float P[Bc / 8][4], dS[Bc / 8][4];
        clear(P);
        clear(dS);
        add_product_transposed(P, Qi, warp_row, Kj(j));
        add_product_transposed(dS, dOi, warp_row, Vj(j));
#pragma unroll
        for (int n = 0; n < Bc / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const bool visible = all || sees[e / 2].contains(j * Bc + 8 * n + lane_column() + e % 2);
                const float x = exponential<T>(P[n][e] * p.scale - l[e / 2]);
                dS[n][e] = visible ? x * (dS[n][e] - delta[e / 2]) : 0;
                if constexpr (divides_by_sum<T>) sum[e / 2] += visible ? x : 0;
            }
        }
        add_product(dQ, dS, Kj(j));
    }
    float scale[2] = {p.scale, p.scale};
    if constexpr (divides_by_sum<T>) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] = row_sum(sum[r]);
            const float inverse = sum[r] > 0 ? 1 / sum[r] : 0;
            const int i = warp_row + lane_row() + 8 * r;
            if (i < count && lane_column() == 0) R[i] = inverse;
            scale[r] *= inverse;
        }
    }
    store(dQ_out, p.dQ.row, count, dQ, scale, Qi, warp_row);
}

// The tiles are transposed: a row is a key. P^T = exp(K Q^T * scale - L),  dV = P^T dO,
// dS^T = P^T * (V dO^T - D),  dK = dS^T Q * scale.
template <class T, int d, int Br, int Bc>
__global__ void __launch_bounds__(Bc / WARP_ROWS * WARP)
    backward_keys(const T* dO, const T* Q, const T* K, const T* V, const float* L, const float* D,
                  const float* R, T* dK_out, T* dV_out, const int* lengths, Problem p) {
    extern __shared__ uint4 shared[];
    const int tiles = ceil_div(p.keys, Bc), kv_heads = p.heads / p.group;
    const int head = blockIdx.x / tiles % kv_heads, batch = blockIdx.x / tiles / kv_heads;
    const int j0 = blockIdx.x % tiles * Bc, count = min(Bc, p.keys - j0);
    const int h0 = head * p.group;  // the first of the query heads that use this key head
    Q += batch * p.Q.batch + h0 * p.Q.head;
    dO += batch * p.dO.batch + h0 * p.dO.head;
    K += batch * p.K.batch + head * p.K.head + j0 * p.K.row;
    V += batch * p.V.batch + head * p.V.head + j0 * p.V.row;
    dK_out += batch * p.dK.batch + head * p.dK.head + j0 * p.dK.row;
    dV_out += batch * p.dV.batch + head * p.dV.head + j0 * p.dV.row;
    L += ((long long)batch * p.heads + h0) * p.queries;
    D += ((long long)batch * p.heads + h0) * p.queries;
    R += ((long long)batch * p.heads + h0) * p.queries;

    const Mask mask(p, lengths, batch);
    const int seen = min(j0 + count, mask.length);  // keys from here on are padding
    const int first = mask.queries_of(j0).begin / Br;
    const int last = seen > j0 ? ceil_div(mask.queries_of(seen - 1).end, Br) : first;
    const int steps = max(0, last - first) * p.group;  // for each query head its tiles of queries

    const Tile<T, d> Kj{(T*)shared}, Vj{Kj.data + Bc * d};
    const auto Qi = [&](int step) { return Tile<T, d>{Vj.data + (Bc + step % 2 * 2 * Br) * d}; };
    const auto dOi = [&](int step) { return Tile<T, d>{Qi(step).data + Br * d}; };
    // L, D and, in float, R of the queries, in two buffers too.
    float* const statistics = (float*)(Vj.data + (Bc + 4 * Br) * d);
    const auto Li = [&](int step) { return statistics + step % 2 * (2 + divides_by_sum<T>) * Br; };
    const auto Di = [&](int step) { return Li(step) + Br; };
    const auto Ri = [&](int step) { return Di(step) + Br; };
    const auto first_query = [&](int step) { return (first + step % (last - first)) * Br; };
    const auto start_loading_queries = [&](int step) {
        const int h = step / (last - first), i0 = first_query(step), rows = p.queries - i0;
        start_loading<Br>(Qi(step), Q + h * p.Q.head + i0 * p.Q.row, p.Q.row, rows);
        start_loading<Br>(dOi(step), dO + h * p.dO.head + i0 * p.dO.row, p.dO.row, rows);
        const long long row = (long long)h * p.queries + i0;
        for (int i = threadIdx.x; i < Br; i += blockDim.x) {
            copy_async<4>(Li(step) + i, L + row + (i < rows ? i : 0), i < rows);
            copy_async<4>(Di(step) + i, D + row + (i < rows ? i : 0), i < rows);
            if constexpr (divides_by_sum<T>) {
                copy_async<4>(Ri(step) + i, R + row + (i < rows ? i : 0), i < rows);
            }
        }
    };

    const int warp_row = threadIdx.x / WARP * WARP_ROWS;
    const int warp_end = min(warp_row + WARP_ROWS, seen - j0);  // up to the last key of this warp that counts
    const Range top = mask.queries_of(j0 + warp_row), bottom = mask.queries_of(j0 + warp_row + WARP_ROWS - 1);
    const Range sees[2] = {mask.queries_of(j0 + warp_row + lane_row()),
                           mask.queries_of(j0 + warp_row + lane_row() + 8)};

    float dK[d / 8][4], dV[d / 8][4];
    clear(dK);
    clear(dV);
    if (steps) {
        start_loading<Bc>(Kj, K, p.K.row, count);
        start_loading<Bc>(Vj, V, p.V.row, count);
        start_loading_queries(0);
    }
    for (int step = 0; step < steps; ++step) {
        wait_for_copies();
        __syncthreads();
        if (step + 1 < steps) start_loading_queries(step + 1);
        const int i0 = first_query(step);
        if (warp_end <= warp_row || !sees_any(top, mask.queries_of(j0 + warp_end - 1), i0, Br)) continue;
        const bool all = sees_all(top, bottom, i0, Br);

        float P[Br / 8][4], dS[Br / 8][4];
        clear(P);
        add_product_transposed(P, Kj, warp_row, Qi(step));
#pragma unroll
        for (int n = 0; n < Br / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int i = 8 * n + lane_column() + e % 2;
                float x = exponential<T>(P[n][e] * p.scale - Li(step)[i]);
                if constexpr (divides_by_sum<T>) x *= Ri(step)[i];
                P[n][e] = all || sees[e / 2].contains(i0 + i) ? x : 0;
            }
        }
        add_product(dV, P, dOi(step));
        clear(dS);
        add_product_transposed(dS, Vj, warp_row, dOi(step));
#pragma unroll
        for (int n = 0; n < Br / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                dS[n][e] = P[n][e] * (dS[n][e] - Di(step)[8 * n + lane_column() + e % 2]);
            }
        }
        add_product(dK, dS, Qi(step));
    }
    const float one[2] = {1, 1}, scale[2] = {p.scale, p.scale};
    store(dV_out, p.dV.row, count, dV, one, Vj, warp_row);
    store(dK_out, p.dK.row, count, dK, scale, Kj, warp_row);
}
