// Attention as its formula reads, in three kernels: S = Q K^T * scale, P = softmax(S), O = P V.
//
// S and P, N x N numbers each, travel to memory and back; flash_attention.cu is measured against this.
// The products are tiled, each number of Q, K, P and V is read once for 32 results.
constexpr int TILE = 32, ROWS = 8;  // a block of 32 x 8 threads computes 32 x 32 results, a thread 4 of them

// C (rows, columns) = A (rows, inner) B * scale, for matrices that lie one after the other. B is (inner,
// columns), or (columns, inner) if it is to be transposed.
template <bool transposed>
__device__ void product(const float* A, const float* B, float* C, int rows, int columns, int inner,
                        float scale) {
    // b holds columns of B as rows. + 4: threads that read down a column, 16 bytes each, meet other banks.
    alignas(16) __shared__ float a[TILE][TILE + 4], b[TILE][TILE + 4];
    const int x = threadIdx.x, column = blockIdx.x * TILE + x, row0 = blockIdx.y * TILE;
    A += (long long)blockIdx.z * rows * inner;
    B += (long long)blockIdx.z * columns * inner;
    C += (long long)blockIdx.z * rows * columns;

    float sum[TILE / ROWS] = {};
    for (int k0 = 0; k0 < inner; k0 += TILE) {
        for (int y = threadIdx.y; y < TILE; y += ROWS) {
            const int row = row0 + y, other = blockIdx.x * TILE + y;
            a[y][x] = row < rows && k0 + x < inner ? A[(long long)row * inner + k0 + x] : 0;
            if (transposed) {
                b[y][x] = other < columns && k0 + x < inner ? B[(long long)other * inner + k0 + x] : 0;
            } else {
                b[x][y] = column < columns && k0 + y < inner ? B[(long long)(k0 + y) * columns + column] : 0;
            }
        }
        __syncthreads();
        for (int k = 0; k < TILE; k += 4) {
            const float4 q = *(const float4*)&b[x][k];
            for (int i = 0; i < TILE / ROWS; ++i) {
                const float4 p = *(const float4*)&a[threadIdx.y + ROWS * i][k];
                sum[i] += p.x * q.x + p.y * q.y + p.z * q.z + p.w * q.w;
            }
        }
        __syncthreads();
    }
    for (int i = 0; i < TILE / ROWS; ++i) {
        const int row = row0 + threadIdx.y + ROWS * i;
        if (row < rows && column < columns) C[(long long)row * columns + column] = sum[i] * scale;
    }
}

__global__ void scores(const float* Q, const float* K, float* S, int n, int m, int d, float scale) {
    product<true>(Q, K, S, n, m, d, scale);
}

// A warp for each row of S; each thread has every 32nd number of it.
__global__ void softmax(const float* S, float* P, int rows, int m) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y, lane = threadIdx.x;
    if (row >= rows) return;
    S += (long long)row * m;
    P += (long long)row * m;
    float top = S[0], sum = 0;
    for (int j = lane; j < m; j += 32) top = fmaxf(top, S[j]);
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, step));
    for (int j = lane; j < m; j += 32) sum += expf(S[j] - top);
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    for (int j = lane; j < m; j += 32) P[j] = expf(S[j] - top) / sum;
}

__global__ void output(const float* P, const float* V, float* O, int n, int m, int d) {
    product<false>(P, V, O, n, d, m, 1);
}
