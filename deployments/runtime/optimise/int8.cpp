// Products of 8-bit rows with 8-bit weights, and attention of single queries over keys and values in rows.
//
// Owns: the kernels that torch has no fast form of on few rows. Must not know: torch, models; int8_linear.py
// and models/llm/rows.py call it through ctypes with plain pointers. Built by native.py for this machine.
//
// Every row is computed by itself and in the same order whatever the other rows are, so that an answer does
// not depend on its batch, not in one bit.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 32;  // outputs of a block of weights: two registers of 16 sums
constexpr int64_t GROUP = 32;  // inputs that share a scale, in rows and in weights
constexpr int64_t BLOCK = GROUP * LANES;
constexpr int ROWS = 8;  // rows of a tile: 8 x 2 sums, 2 weights and 1 input fill 19 of 32 registers

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));

Floats splat(float x) { return Floats{} + x; }

// By halves: 16 additions one after another took three quarters of the attention's time.
float sum_of(Floats x) {
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half low, high;
    std::memcpy(&low, &x, 32);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + 32, 32);
    low += high;
    Quarter first, second;
    std::memcpy(&first, &low, 16);
    std::memcpy(&second, reinterpret_cast<const char*>(&low) + 16, 16);
    first += second;
    return (first[0] + first[2]) + (first[1] + first[3]);
}

// e^x within 2e-7 of its value; NaN stays NaN. 2^n by the exponent's bits, 2^f by Taylor's series, |f| <= 0.5.
Floats exp16(Floats x) {
    x = x < -87.f ? splat(-87.f) : x;
    x = x > 88.f ? splat(88.f) : x;
    const Floats y = x * 1.44269504f;
    const Ints n = __builtin_convertvector(y + (y < 0.f ? splat(-.5f) : splat(.5f)), Ints);
    const Floats whole = __builtin_convertvector(n, Floats);
    const Floats f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts (Cody, Waite)
    Floats p = splat(1.f / 5040);
    p = p * f + 1.f / 720;
    p = p * f + 1.f / 120;
    p = p * f + 1.f / 24;
    p = p * f + 1.f / 6;
    p = p * f + .5f;
    p = p * f + 1.f;
    p = p * f + 1.f;
    return p * (Floats)((n + 127) << 23);
}

// One row to 8 bits, round(127 x / max|x|) by groups, filled up with zeros. floor >= 0: the row is divided by
// sqrt(sum x^2 + floor) first, which the scales alone carry. A NaN makes a scale NaN, and so all answers.
// starts: -128 times the sum of a group, since weights are stored 128 larger than they are.
void quantise(const float* x, int64_t size, int64_t groups, float floor, int8_t* out, float* scales, int32_t* starts) {
    float norm = 1.f;
    if (floor >= 0.f) {
        float squares = 0.f;
        for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
        norm = 1.f / std::sqrt(squares + floor);
    }
    for (int64_t g = 0; g < groups; g++) {
        float own[GROUP] = {};
        const int64_t left = size - g * GROUP;
        if (left >= GROUP)
            std::memcpy(own, x + g * GROUP, sizeof own);
        else
            std::memcpy(own, x + g * GROUP, left * sizeof(float));
        uint32_t bits[GROUP], largest = 0;  // of the bits: a NaN is larger than any number, whatever else is there
        std::memcpy(bits, own, sizeof own);
        for (int64_t i = 0; i < GROUP; i++) {
            bits[i] &= 0x7fffffffu;
            largest = bits[i] > largest ? bits[i] : largest;
        }
        float most;
        std::memcpy(&most, &largest, 4);
        const float factor = most > 0.f ? 127.f / most : 0.f;
        int32_t sum = 0;
        for (int64_t i = 0; i < GROUP; i++) {
            const float scaled = own[i] * factor;
            const int32_t rounded = static_cast<int32_t>(scaled + (scaled < 0.f ? -.5f : .5f));
            out[g * GROUP + i] = static_cast<int8_t>(rounded);
            sum += rounded;
        }
        scales[g] = most / 127.f * norm;
        starts[g] = -128 * sum;
    }
}

// What `quantise` makes of rows.
struct Rows {
    const int8_t* values;   // [rows, groups * 32]
    const float* scales;    // [rows, groups]
    const int32_t* starts;  // [rows, groups]
    int64_t groups;
};

// sums[R][32] = rows from `first` on . one block of weights [groups, 8, 32, 4] with scales [groups, 32]
template <int R>
void multiply(const Rows& x, int64_t first, const uint8_t* weights, const float* scales, float* sums) {
    std::memset(sums, 0, R * LANES * sizeof(float));
    for (int64_t g = 0; g < x.groups; g++, weights += BLOCK, scales += LANES) {
        const int8_t* const values = x.values + (first * x.groups + g) * GROUP;
        const int64_t next = x.groups * GROUP;
#ifdef __AVX512VNNI__
        __m512i a[R], b[R];
        for (int r = 0; r < R; r++) a[r] = b[r] = _mm512_set1_epi32(x.starts[(first + r) * x.groups + g]);
        for (int64_t k = 0; k < GROUP / 4; k++) {
            const __m512i left = _mm512_loadu_si512(weights + k * 128);
            const __m512i right = _mm512_loadu_si512(weights + k * 128 + 64);
            for (int r = 0; r < R; r++) {
                int32_t four;
                std::memcpy(&four, values + r * next + k * 4, 4);
                const __m512i input = _mm512_set1_epi32(four);
                a[r] = _mm512_dpbusd_epi32(a[r], left, input);
                b[r] = _mm512_dpbusd_epi32(b[r], right, input);
            }
        }
        const __m512 left = _mm512_loadu_ps(scales), right = _mm512_loadu_ps(scales + 16);
        for (int r = 0; r < R; r++) {
            const __m512 scale = _mm512_set1_ps(x.scales[(first + r) * x.groups + g]);
            float* const to = sums + r * LANES;
            const __m512 by_left = _mm512_mul_ps(left, scale), by_right = _mm512_mul_ps(right, scale);
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[r]), by_left, _mm512_loadu_ps(to)));
            _mm512_storeu_ps(to + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(b[r]), by_right, _mm512_loadu_ps(to + 16)));
        }
#else
        for (int r = 0; r < R; r++) {
            int32_t own[LANES];
            for (int64_t lane = 0; lane < LANES; lane++) own[lane] = x.starts[(first + r) * x.groups + g];
            for (int64_t k = 0; k < GROUP / 4; k++)
                for (int64_t lane = 0; lane < LANES; lane++)
                    for (int64_t i = 0; i < 4; i++)
                        own[lane] += int32_t(weights[(k * LANES + lane) * 4 + i]) * values[r * next + k * 4 + i];
            const float scale = x.scales[(first + r) * x.groups + g];
            for (int64_t lane = 0; lane < LANES; lane++)
                sums[r * LANES + lane] += float(own[lane]) * (scales[lane] * scale);
        }
#endif
    }
}

void multiply(int rows, const Rows& x, int64_t first, const uint8_t* weights, const float* scales, float* sums) {
    switch (rows) {
        case 1: return multiply<1>(x, first, weights, scales, sums);
        case 2: return multiply<2>(x, first, weights, scales, sums);
        case 3: return multiply<3>(x, first, weights, scales, sums);
        case 4: return multiply<4>(x, first, weights, scales, sums);
        case 5: return multiply<5>(x, first, weights, scales, sums);
        case 6: return multiply<6>(x, first, weights, scales, sums);
        case 7: return multiply<7>(x, first, weights, scales, sums);
        default: return multiply<8>(x, first, weights, scales, sums);
    }
}

const Floats& floats(const float* at) { return *reinterpret_cast<const Floats*>(at); }

// D: head size / 16. G queries of one group over the first `length` keys and values [length, D * 16], each of
// which is read once. scores: room for G * (length + 15).
template <int D, int G>
void attend_group(const float* queries, const float* keys, const float* values, int64_t length, float factor,
                  float* scores, float* out) {
    const int64_t padded = (length + 15) / 16 * 16;
    Floats query[G][D], mixed[G][D] = {};
    float best[G], weight[G] = {};
    for (int g = 0; g < G; g++) {
        best[g] = -INFINITY;
        for (int d = 0; d < D; d++) query[g][d] = floats(queries + (g * D + d) * 16) * factor;
    }
    for (int64_t j = 0; j < length; j++)
        for (int g = 0; g < G; g++) {
            Floats products = query[g][0] * floats(keys + j * D * 16);
            for (int d = 1; d < D; d++) products += query[g][d] * floats(keys + (j * D + d) * 16);
            const float score = sum_of(products);
            scores[g * padded + j] = score;
            best[g] = score > best[g] ? score : best[g];
        }
    for (int g = 0; g < G; g++) {
        float* const own = scores + g * padded;
        for (int64_t j = length; j < padded; j++) own[j] = -INFINITY;
        for (int64_t j = 0; j < padded; j += 16) {
            Floats& part = *reinterpret_cast<Floats*>(own + j);
            part = exp16(part - best[g]);
        }
        for (int64_t j = 0; j < length; j++) weight[g] += own[j];
    }
    for (int64_t j = 0; j < length; j++)
        for (int g = 0; g < G; g++)
            for (int d = 0; d < D; d++) mixed[g][d] += scores[g * padded + j] * floats(values + (j * D + d) * 16);
    for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++) *reinterpret_cast<Floats*>(out + (g * D + d) * 16) = mixed[g][d] / weight[g];
}

// Any number of queries, up to three at a time: their sums stay in registers.
template <int D>
void attend(const float* queries, int64_t group, const float* keys, const float* values, int64_t length, float factor,
            float* scores, float* out) {
    for (int64_t g = 0; g < group; g += 3) {
        const float* const some = queries + g * D * 16;
        float* const to = out + g * D * 16;
        if (group - g == 1)
            attend_group<D, 1>(some, keys, values, length, factor, scores, to);
        else if (group - g == 2)
            attend_group<D, 2>(some, keys, values, length, factor, scores, to);
        else
            attend_group<D, 3>(some, keys, values, length, factor, scores, to);
    }
}

}  // namespace

extern "C" {

// How a product ends.
enum End : int64_t { PLAIN = 0, PLUS = 1, GATED = 2 };

struct Linear {
    const uint8_t* weights;  // [blocks, groups, 8, 32, 4], each 128 larger than it is
    const float* scales;     // [blocks, groups, 32]
    const float* bias;       // [blocks, 32], or null
    int64_t inputs, blocks;
    int64_t outputs;         // of the answer: with GATED half as many as rows of weights
    int64_t end;
    float floor;             // of `quantise`
};

// out[rows, outputs] = the product of x[rows, inputs], then + other[rows, outputs], or SiLU(first 16 of a
// block) * last 16 of it. All contiguous.
void brimful_linear(const Linear* linear, const float* x, int64_t rows, const float* other, float* out,
                    int64_t threads) {
    const int64_t groups = (linear->inputs + GROUP - 1) / GROUP;
    static thread_local std::vector<int8_t> value_room;
    static thread_local std::vector<float> scale_room;
    static thread_local std::vector<int32_t> start_room;
    if (int64_t(scale_room.size()) < rows * groups) {
        value_room.resize(rows * groups * GROUP);
        scale_room.resize(rows * groups);
        start_room.resize(rows * groups);
    }
    // Other threads have vectors of their own by these names.
    int8_t* const values = value_room.data();
    float* const scales = scale_room.data();
    int32_t* const starts = start_room.data();
    const Rows quantised = {values, scales, starts, groups};
    const int64_t width = linear->end == GATED ? LANES / 2 : LANES;
    // Few rows take a microsecond; to wait for a thread takes as long, and far longer where cores are busy.
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 2 * ROWS)
    for (int64_t t = 0; t < rows; t++)
        quantise(x + t * linear->inputs, linear->inputs, groups, linear->floor, values + t * groups * GROUP,
                 scales + t * groups, starts + t * groups);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t block = 0; block < linear->blocks; block++) {
        alignas(64) float sums[ROWS * LANES];
        const int64_t first = block * width;
        const int64_t count = linear->outputs - first < width ? linear->outputs - first : width;
        for (int64_t t = 0; t < rows; t += ROWS) {
            const int many = rows - t < ROWS ? int(rows - t) : ROWS;
            multiply(many, quantised, t, linear->weights + block * groups * BLOCK,
                     linear->scales + block * groups * LANES, sums);
            for (int r = 0; r < many; r++) {
                float* const y = sums + r * LANES;
                if (linear->bias)
                    for (int64_t i = 0; i < LANES; i++) y[i] += linear->bias[block * LANES + i];
                if (linear->end == GATED) {
                    Floats& gate = *reinterpret_cast<Floats*>(y);
                    gate = gate / (1.f + exp16(-gate)) * *reinterpret_cast<Floats*>(y + 16);
                }
                const int64_t at = (t + r) * linear->outputs + first;
                if (linear->end == PLUS)
                    for (int64_t i = 0; i < count; i++) out[at + i] = y[i] + other[at + i];
                else
                    std::memcpy(out + at, y, count * sizeof(float));
            }
        }
    }
}

struct Attention {
    int64_t heads, kv_heads;
    int64_t head_size;  // 16, 32, 64 or 128
    int64_t capacity;   // tokens of a row
};

// Queries, keys and values of single tokens, heads[rows, heads + 2 kv_heads, D]: stores the keys and values
// at places[t] of the row that begins at memory + starts[t], [2, kv_heads, capacity, D], then attends to
// what lies there up to that place: out[rows, heads, D].
void brimful_attend(const Attention* shape, float* memory, const int64_t* starts, const int64_t* places,
                    const float* heads, int64_t rows, float* out, int64_t threads) {
    const int64_t size = shape->head_size, group = shape->heads / shape->kv_heads;
    const int64_t values_at = shape->kv_heads * shape->capacity * size;
    const float factor = 1.f / std::sqrt(float(size));
#pragma omp parallel num_threads(threads)
    {
        static thread_local std::vector<float> scores;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < rows * shape->kv_heads; task++) {
            const int64_t t = task / shape->kv_heads, head = task % shape->kv_heads;
            const int64_t length = places[t] + 1;
            if (int64_t(scores.size()) < 3 * (length + 15)) scores.resize(6 * (length + 15));
            const float* const own = heads + t * (shape->heads + 2 * shape->kv_heads) * size;
            float* const keys = memory + starts[t] + head * shape->capacity * size;
            const float* const new_key = own + (shape->heads + head) * size;
            std::memcpy(keys + places[t] * size, new_key, size * sizeof(float));
            std::memcpy(keys + values_at + places[t] * size, new_key + shape->kv_heads * size, size * sizeof(float));
            const float* const queries = own + head * group * size;
            float* const mixed = out + (t * shape->heads + head * group) * size;
            switch (size) {
                case 16: attend<1>(queries, group, keys, keys + values_at, length, factor, scores.data(), mixed); break;
                case 32: attend<2>(queries, group, keys, keys + values_at, length, factor, scores.data(), mixed); break;
                case 64: attend<4>(queries, group, keys, keys + values_at, length, factor, scores.data(), mixed); break;
                default: attend<8>(queries, group, keys, keys + values_at, length, factor, scores.data(), mixed);
            }
        }
    }
}
}
