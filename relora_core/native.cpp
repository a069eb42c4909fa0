// Attention, the head's softmax and elementwise chains in one pass each. Not for: what they mean
// (model.py, loss.py), large products (torch's BLAS does them as well as one can).
//
// Built where it runs, for the processor it runs on (native.py). Tests hold every function against
// float64. All tensors are contiguous float32 but where a comment says bf16. No result depends on
// the number of threads: whatever is summed over rows is summed in pieces of a fixed size.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "a flag that changes values (-ffast-math, -Ofast or a part of it) reaches the build"
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int BYTES = 4 * LANES;
constexpr int KEYS = 128;  // scores of as many queries as lanes by so many keys stay in the cache
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST = -1e38f;  // no infinity: the difference of two is no number

typedef float vec __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));
typedef uint32_t words __attribute__((vector_size(BYTES)));
typedef uint16_t halves __attribute__((vector_size(BYTES / 2)));
typedef float vec8 __attribute__((vector_size(32)));

template <typename T> inline T load(const void* from) {
  T x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <typename T> inline void store(void* to, T x) { std::memcpy(to, &x, sizeof x); }
inline vec all(float x) { return x - vec{}; }
inline vec larger(vec a, vec b) { return a < b ? b : a; }
inline float sum(vec x) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}
inline float largest(vec x) {
  float most = x[0];
  for (int i = 1; i < LANES; ++i) most = std::max(most, x[i]);
  return most;
}
// Rows that one thread sums up: at most 32 sums, however many rows and threads there are
inline int64_t piece_of(int64_t rows) { return std::max<int64_t>(128, (rows / 32 + 31) / 32 * 32); }
inline vec lanes() {
  vec x;
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}

typedef std::unique_ptr<float[]> Room;
inline Room room(int64_t n) { return Room(new float[n]()); }  // zeros

// bf16 to float and back, to the nearest, ties to even; what is no number stays none.
inline vec widen(halves x) { return (vec)(__builtin_convertvector(x, words) << 16); }
inline halves narrow(vec x) {
  words bits = (words)x;
  words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = x == x ? rounded : (bits >> 16) | 64u;
  return __builtin_convertvector(rounded, halves);
}

// 2^x to 2e-7 of it, at least 2^-126; what is no number stays none.
inline vec exp2(vec x) {
  x = x < -126.0f ? all(-126.0f) : x;
  const vec nearest = x + 12582912.0f;  // 1.5 * 2^23: the integer is in the lowest bits
  const vec f = x - (nearest - 12582912.0f);
  vec p = all(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return p * (vec)(((ints)nearest + 127) << 23);
}
inline vec sigmoid(vec x) {
  x *= -LOG2E;
  return 1.0f / (1.0f + exp2(x > 126.0f ? all(126.0f) : x));
}

// attention ---------------------------------------------------------------------------------------
// As many queries at a time as there are lanes, one in each; of keys and values one number is read
// for all lanes.

struct Shape {
  int64_t batch, length, heads, kv;
};

template <int D> inline void take(vec* to, const float* from, int64_t stride, int rows, float by) {
  float out[D][LANES] = {};
  for (int i = 0; i < rows; ++i)
    for (int d = 0; d < D; ++d) out[d][i] = from[i * stride + d] * by;
  std::memcpy(to, out, sizeof out);
}
template <int D> inline void put(float* to, const vec* from, int64_t stride, int rows, float by) {
  float in[D][LANES];
  std::memcpy(in, from, sizeof in);
  for (int i = 0; i < rows; ++i)
    for (int d = 0; d < D; ++d) to[i * stride + d] = in[d][i] * by;
}

// out[j] = sum_d a[d] * rows[j][d]
template <int D> inline void products(vec* out, const vec* a, const float* rows, int n) {
  int j = 0;
  for (; j + 4 <= n; j += 4) {
    vec s[4] = {};
    for (int d = 0; d < D; ++d)
      for (int u = 0; u < 4; ++u) s[u] += a[d] * rows[(j + u) * D + d];
    for (int u = 0; u < 4; ++u) out[j + u] = s[u];
  }
  for (; j < n; ++j) {
    vec s{};
    for (int d = 0; d < D; ++d) s += a[d] * rows[j * D + d];
    out[j] = s;
  }
}

// to[d] += sum_j p[j] * rows[j][d]
template <int D> inline void gather(vec* to, const vec* p, const float* rows, int n) {
  for (int c = 0; c < D; c += 8) {
    vec s[8];
    for (int d = 0; d < 8; ++d) s[d] = to[c + d];
    for (int j = 0; j < n; ++j)
      for (int d = 0; d < 8; ++d) s[d] += p[j] * rows[j * D + c + d];
    for (int d = 0; d < 8; ++d) to[c + d] = s[d];
  }
}

// to[j][d] += sum_lane p[j][lane] * rows[lane][d]
template <int D, int N> inline void scatter(float* to, const float* p, const float* rows) {
  for (int c = 0; c < D; c += 8) {
    vec8 s[N];
    for (int u = 0; u < N; ++u) s[u] = load<vec8>(to + u * D + c);
    for (int i = 0; i < LANES; ++i) {
      const vec8 row = load<vec8>(rows + i * D + c);
      for (int u = 0; u < N; ++u) s[u] += row * p[u * LANES + i];
    }
    for (int u = 0; u < N; ++u) store(to + u * D + c, s[u]);
  }
}
template <int D> inline void scatter(float* to, const vec* p, const float* rows, int n) {
  const float* flat = reinterpret_cast<const float*>(p);
  int j = 0;
  for (; j + 4 <= n; j += 4) scatter<D, 4>(to + j * D, flat + j * LANES, rows);
  for (; j < n; ++j) scatter<D, 1>(to + j * D, flat + j * LANES, rows);
}

template <int D> inline void pack(float* to, const float* from, int64_t length, int64_t stride) {
  for (int64_t j = 0; j < length; ++j) std::memcpy(to + j * D, from + j * stride, D * sizeof *to);
}

// p[j - start] = other in the lanes whose query comes before key j
inline void mask(vec* p, int64_t start, int64_t end, int64_t first, float other) {
  for (int64_t j = std::max(start, first + 1); j < end; ++j)
    p[j - start] = lanes() < static_cast<float>(j - first) ? all(other) : p[j - start];
}

template <int D>
void attend(const float* q, const float* k, const float* v, float* out, float* sums, Shape s,
            float scale, int threads) {
  const int64_t T = s.length, H = s.heads, KV = s.kv, group = H / KV;
#pragma omp parallel num_threads(threads)
  {
    const Room own = room(2 * T * D);
    float *keys = own.get(), *values = keys + T * D;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.batch * KV; ++task) {
      const int64_t b = task / KV, kv = task % KV;
      pack<D>(keys, k + (b * T * KV + kv) * D, T, KV * D);
      pack<D>(values, v + (b * T * KV + kv) * D, T, KV * D);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        for (int64_t first = 0; first < T; first += LANES) {
          const int rows = std::min<int64_t>(LANES, T - first);
          const int64_t at = ((b * T + first) * H + h) * D, stop = first + rows;
          vec a[D], y[D] = {}, p[KEYS], top = all(LOWEST), total{};
          take<D>(a, q + at, H * D, rows, scale);
          for (int64_t start = 0; start < stop; start += KEYS) {
            const int64_t end = std::min(start + KEYS, stop), n = end - start;
            products<D>(p, a, keys + start * D, n);
            mask(p, start, end, first, LOWEST);
            vec grown = top;
            for (int j = 0; j < n; ++j) grown = larger(grown, p[j]);
            const vec shrink = exp2(top - grown);
            top = grown;
            total *= shrink;
            for (int d = 0; d < D; ++d) y[d] *= shrink;
            for (int j = 0; j < n; ++j) total += p[j] = exp2(p[j] - top);
            gather<D>(y, p, values + start * D, n);
          }
          for (int d = 0; d < D; ++d) y[d] /= total;
          put<D>(out + at, y, H * D, rows, 1.0f);
          for (int i = 0; i < rows; ++i)
            sums[(b * H + h) * T + first + i] = top[i] + std::log2(total[i]);
        }
    }
  }
}

template <int D>
void attend_back(const float* q, const float* k, const float* v, const float* out,
                 const float* sums, const float* upstream, float* dq, float* dk, float* dv, Shape s,
                 float scale, int threads) {
  const int64_t T = s.length, H = s.heads, KV = s.kv, group = H / KV;
  const float back = scale / LOG2E;
#pragma omp parallel num_threads(threads)
  {
    const Room own = room(4 * T * D);
    float *keys = own.get(), *values = keys + T * D;
    float *d_keys = values + T * D, *d_values = d_keys + T * D;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < s.batch * KV; ++task) {
      const int64_t b = task / KV, kv = task % KV;
      pack<D>(keys, k + (b * T * KV + kv) * D, T, KV * D);
      pack<D>(values, v + (b * T * KV + kv) * D, T, KV * D);
      std::fill_n(d_keys, 2 * T * D, 0.0f);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        for (int64_t first = 0; first < T; first += LANES) {
          const int rows = std::min<int64_t>(LANES, T - first);
          const int64_t at = ((b * T + first) * H + h) * D, stop = first + rows;
          vec a[D], g[D], da[D] = {}, p[KEYS], dp[KEYS], top{}, delta{};
          float queries[LANES * D] = {}, grads[LANES * D] = {};
          take<D>(a, q + at, H * D, rows, scale);
          take<D>(g, upstream + at, H * D, rows, 1.0f);
          pack<D>(queries, q + at, rows, H * D);
          pack<D>(grads, upstream + at, rows, H * D);
          for (int i = 0; i < rows; ++i) {
            top[i] = sums[(b * H + h) * T + first + i];
            for (int d = 0; d < D; ++d) delta[i] += grads[i * D + d] * out[at + i * H * D + d];
          }
          for (int64_t start = 0; start < stop; start += KEYS) {
            const int64_t end = std::min(start + KEYS, stop), n = end - start;
            products<D>(p, a, keys + start * D, n);
            products<D>(dp, g, values + start * D, n);
            for (int j = 0; j < n; ++j) p[j] = exp2(p[j] - top);
            mask(p, start, end, first, 0.0f);
            for (int j = 0; j < n; ++j) dp[j] = p[j] * (dp[j] - delta);
            gather<D>(da, dp, keys + start * D, n);
            scatter<D>(d_values + start * D, p, grads, n);
            scatter<D>(d_keys + start * D, dp, queries, n);
          }
          put<D>(dq + at, da, H * D, rows, back);
        }
      for (int64_t j = 0; j < T; ++j)
        for (int d = 0; d < D; ++d) {
          dk[((b * T + j) * KV + kv) * D + d] = d_keys[j * D + d] * back;
          dv[((b * T + j) * KV + kv) * D + d] = d_values[j * D + d];
        }
    }
  }
}

// numbers in memory: float32 or bf16 --------------------------------------------------------------
struct Wide {
  typedef float type;
  static vec get(const float* x) { return load<vec>(x); }
  static void set(float* x, vec y) { store(x, y); }
  static float get_one(const float* x) { return *x; }
  static void set_one(float* x, float y) { *x = y; }
};
struct Narrow {
  typedef uint16_t type;
  static vec get(const uint16_t* x) { return widen(load<halves>(x)); }
  static void set(uint16_t* x, vec y) { store(x, narrow(y)); }
  static float get_one(const uint16_t* x) { return widen(halves{} + *x)[0]; }
  static void set_one(uint16_t* x, float y) { *x = narrow(all(y))[0]; }
};

// the head ----------------------------------------------------------------------------------------
template <typename F>
void exponentials(typename F::type* z, int64_t rows, int64_t columns, const int64_t* own,
                  float* top, float* total, float* mean, int64_t width, int threads) {
  const int64_t whole = columns / LANES * LANES;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    typename F::type* row = z + i * columns;
    if (0 <= own[i] && own[i] < columns) F::set_one(row + own[i], LOWEST);
    vec most[2] = {all(top[i]), all(top[i])};
    int64_t j = 0;
    for (; j + 2 * LANES <= whole; j += 2 * LANES)
      for (int u = 0; u < 2; ++u) most[u] = larger(most[u], F::get(row + j + u * LANES));
    for (; j < whole; j += LANES) most[0] = larger(most[0], F::get(row + j));
    float grown = largest(larger(most[0], most[1]));
    for (; j < columns; ++j) grown = std::max(grown, F::get_one(row + j));
    vec sums{};
    for (j = 0; j < whole; j += LANES) {
      const vec e = exp2(F::get(row + j) - grown);
      F::set(row + j, e);
      sums += e;
    }
    float rest = 0;
    for (; j < columns; ++j) {
      const float e = exp2(all(F::get_one(row + j) - grown))[0];
      F::set_one(row + j, e);
      rest += e;
    }
    const float shrink = exp2(all(top[i] - grown))[0];
    total[i] = total[i] * shrink + (sum(sums) + rest);
    top[i] = grown;
    if (mean != nullptr && shrink != 1.0f)
      for (int64_t c = 0; c < width; ++c) mean[i * width + c] *= shrink;
  }
}

// SwiGLU ------------------------------------------------------------------------------------------
template <typename F, typename G> void each(int64_t n, int threads, G act) {
  const int64_t whole = n / LANES * LANES;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < whole; i += LANES)
    act(i, [](const typename F::type* x) { return F::get(x); },
        [](typename F::type* x, vec y) { F::set(x, y); });
  for (int64_t i = whole; i < n; ++i)
    act(i, [](const typename F::type* x) { return all(F::get_one(x)); },
        [](typename F::type* x, vec y) { F::set_one(x, y[0]); });
}

template <typename F, typename T = typename F::type>
void swiglu(const T* gate, const T* value, T* out, int64_t n, int threads) {
  each<F>(n, threads, [=](int64_t i, auto get, auto set) {
    const vec x = get(gate + i);
    set(out + i, x * sigmoid(x) * get(value + i));
  });
}

template <typename F, typename T = typename F::type>
void swiglu_back(const T* gate, const T* value, const T* upstream, T* d_gate, T* d_value, int64_t n,
                 int threads) {
  each<F>(n, threads, [=](int64_t i, auto get, auto set) {
    const vec x = get(gate + i), g = get(upstream + i), s = sigmoid(x);
    set(d_gate + i, g * get(value + i) * s * (1.0f + x * (1.0f - s)));
    set(d_value + i, g * x * s);
  });
}

// adapters ----------------------------------------------------------------------------------------
// Rows of some 32 tokens go through both thin products while they are in the cache. Columns that
// stand side by side come in whole vectors: the ranks of a product are padded with zeros.
constexpr int ROWS = 32;

// c[m][n] = old * c[m][n] + by * sum_p a[m * am + p * ap] * b[p * ldb + n], n of N vectors
template <int M, int N>
inline void block(float* c, int64_t ldc, const float* a, int64_t am, int64_t ap, const float* b,
                  int64_t ldb, int64_t depth, float by, bool old) {
  vec s[M][N] = {};
  for (int64_t p = 0; p < depth; ++p) {
    vec row[N];
    for (int n = 0; n < N; ++n) row[n] = load<vec>(b + p * ldb + n * LANES);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) s[m][n] += row[n] * a[m * am + p * ap];
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      float* to = c + m * ldc + n * LANES;
      store(to, old ? load<vec>(to) + s[m][n] * by : s[m][n] * by);
    }
}
template <int N>
inline void blocks(float* c, int64_t ldc, const float* a, int64_t am, int64_t ap, const float* b,
                   int64_t ldb, int64_t rows, int64_t depth, float by, bool old) {
  constexpr int M = LANES == 16 ? 16 / N : 8 / N;  // as many sums as there are registers
  int64_t m = 0;
  for (; m + M <= rows; m += M)
    block<M, N>(c + m * ldc, ldc, a + m * am, am, ap, b, ldb, depth, by, old);
  for (; m < rows; ++m)
    block<1, N>(c + m * ldc, ldc, a + m * am, am, ap, b, ldb, depth, by, old);
}
void product(float* c, int64_t ldc, const float* a, int64_t am, int64_t ap, const float* b,
             int64_t ldb, int64_t rows, int64_t columns, int64_t depth, float by, bool old) {
  int64_t n = 0;
  for (; n + 2 * LANES <= columns; n += 2 * LANES)
    blocks<2>(c + n, ldc, a, am, ap, b + n, ldb, rows, depth, by, old);
  if (n < columns) blocks<1>(c + n, ldc, a, am, ap, b + n, ldb, rows, depth, by, old);
}

// Entry e of a dropout is kept where 16 bits of a number, the (e / 4)th of a generator (SplitMix64:
// Steele et al. 2014), are below `cut`. Any part can be drawn anew, by any thread. Entries are
// those of all sequences of a step, of which these are every `stride`th.
struct Dropout {
  uint64_t seed;
  int64_t cut, tokens, stride;
  int64_t place(int64_t row) const { return row + row / tokens * tokens * (stride - 1); }
};
typedef uint64_t draws __attribute__((vector_size(2 * LANES)));

inline vec keep(vec x, Dropout dropout, int64_t first) {
  draws z;
  for (int i = 0; i < LANES / 4; ++i) z[i] = first / 4 + 1 + i;
  z = z * 0x9e3779b97f4a7c15u + dropout.seed;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return __builtin_convertvector((halves)z, ints) < static_cast<int>(dropout.cut) ? x : vec{};
}

// What dropout leaves of `rows` rows of n entries, from the first row on, as float32
template <typename F>
void drop(float* to, const typename F::type* x, int64_t first, int64_t rows, int64_t n,
          Dropout dropout) {
  for (int64_t row = first; row < first + rows; ++row, to += n, x += n) {
    const int64_t entry = dropout.place(row) * n;
    for (int64_t i = 0; i < n; i += LANES)
      store(to + i, dropout.cut < 65536 ? keep(F::get(x + i), dropout, entry + i) : F::get(x + i));
  }
}
// n numbers as float32: where they are if they are float32, else in `room`
template <typename F> const float* wide(const typename F::type* from, float* room, int64_t n) {
  if constexpr (std::is_same_v<F, Wide>) return from;
  for (int64_t i = 0; i < n; i += LANES) store(room + i, F::get(from + i));
  return room;
}

int64_t padded(int64_t rank) { return (rank + 15) / 16 * 16; }

// to[j][k] = from[k * fk + j * fj], k < rank, else 0
void pad(float* to, const float* from, int64_t n, int64_t rank, int64_t fk, int64_t fj) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t k = 0; k < rank; ++k) to[j * padded(rank) + k] = from[k * fk + j * fj];
}

struct Sizes {
  int64_t rows, in, out, rank;
};

template <typename F, typename T = typename F::type>
void adapt(const T* x, const float* a, const float* b, T* y, float* low, Sizes s, float scale,
           Dropout dropout, int threads) {
  const int64_t R = padded(s.rank);
  const Room down = room(s.in * R), up = room(s.rank * s.out);
  pad(down.get(), a, s.in, s.rank, s.in, 1);
  for (int64_t o = 0; o < s.out; ++o)
    for (int64_t k = 0; k < s.rank; ++k) up[k * s.out + o] = b[o * s.rank + k];
#pragma omp parallel num_threads(threads)
  {
    const Room kept = room(ROWS * s.in), outer = room(ROWS * s.out);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < s.rows; first += ROWS) {
      const int64_t rows = std::min<int64_t>(ROWS, s.rows - first);
      float* thin = low + first * R;
      drop<F>(kept.get(), x + first * s.in, first, rows, s.in, dropout);
      product(thin, R, kept.get(), s.in, 1, down.get(), R, rows, R, s.in, 1.0f, false);
      T* to = y + first * s.out;
      float* sum = const_cast<float*>(wide<F>(to, outer.get(), rows * s.out));
      product(sum, s.out, thin, R, 1, up.get(), s.out, rows, s.out, s.rank, scale, true);
      for (int64_t i = 0; sum != static_cast<void*>(to) && i < rows * s.out; i += LANES)
        F::set(to + i, load<vec>(sum + i));
    }
  }
}

template <typename F, typename T = typename F::type>
void adapt_back(const T* x, const float* a, const float* b, const float* low, const T* upstream,
                T* dx, float* da, float* db, Sizes s, float scale, Dropout dropout, int threads) {
  const int64_t R = padded(s.rank), size = piece_of(s.rows), pieces = (s.rows + size - 1) / size;
  const int64_t size_a = s.rank * s.in, size_b = s.out * R;
  const Room down = room(s.out * R), sums = room(pieces * (size_a + size_b));
  pad(down.get(), b, s.out, s.rank, 1, s.rank);
#pragma omp parallel num_threads(threads)
  {
    const Room kept = room(ROWS * s.in), outer = room(ROWS * s.out), thin = room(ROWS * R);
    const Room back = room(ROWS * s.in);
#pragma omp for schedule(static)
    for (int64_t piece = 0; piece < pieces; ++piece) {
      float *own_a = sums.get() + piece * (size_a + size_b), *own_b = own_a + size_a;
      const int64_t stop = std::min(s.rows, (piece + 1) * size);
      for (int64_t first = piece * size; first < stop; first += ROWS) {
        const int64_t rows = std::min<int64_t>(ROWS, stop - first);
        const int64_t entry = first * s.in;
        drop<F>(kept.get(), x + entry, first, rows, s.in, dropout);
        const float* g = wide<F>(upstream + first * s.out, outer.get(), rows * s.out);
        product(thin.get(), R, g, s.out, 1, down.get(), R, rows, R, s.out, scale, false);
        product(own_b, R, g, 1, s.out, low + first * R, R, s.out, R, rows, scale, true);
        product(own_a, s.in, thin.get(), 1, R, kept.get(), s.in, s.rank, s.in, rows, 1.0f, true);
        if (dx == nullptr) continue;
        product(back.get(), s.in, thin.get(), R, 1, a, s.in, rows, s.in, s.rank, 1.0f, false);
        drop<Wide>(back.get(), back.get(), first, rows, s.in, dropout);
        for (int64_t i = 0; i < rows * s.in; i += LANES)
          F::set(dx + entry + i, F::get(dx + entry + i) + load<vec>(back.get() + i));
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size_a; i += LANES) {
      vec total{};
      for (int64_t p = 0; p < pieces; ++p) total += load<vec>(&sums[p * (size_a + size_b) + i]);
      store(da + i, total);
    }
#pragma omp for schedule(static)
    for (int64_t o = 0; o < s.out; ++o)
      for (int64_t k = 0; k < s.rank; k += LANES) {
        vec total{};
        for (int64_t p = 0; p < pieces; ++p)
          total += load<vec>(&sums[p * (size_a + size_b) + size_a + o * R + k]);
        for (int64_t l = k; l < std::min(k + LANES, s.rank); ++l) db[o * s.rank + l] = total[l - k];
      }
  }
}

}  // namespace

#define BY_HEAD_SIZE(call) \
  switch (size) {          \
    case 8: call(8);       \
    case 16: call(16);     \
    case 32: call(32);     \
    case 64: call(64);     \
  }                        \
  return 1;

extern "C" {

const char* compiler() { return __VERSION__; }

// What the code was built for and this processor has not: it dies of the first such instruction.
const char* lacks() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512f")) return "avx512f";
#endif
#if defined(__AVX512BW__)
  if (!__builtin_cpu_supports("avx512bw")) return "avx512bw";
#endif
#if defined(__AVX512VL__)
  if (!__builtin_cpu_supports("avx512vl")) return "avx512vl";
#endif
#if defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2")) return "avx2";
#endif
#if defined(__FMA__)
  if (!__builtin_cpu_supports("fma")) return "fma";
#endif
#if defined(__AVX__)
  if (!__builtin_cpu_supports("avx")) return "avx";
#endif
#endif
  return nullptr;
}

// softmax(q k^T / sqrt D) v over earlier positions: q and out (B, T, H, D), k and v (B, T, KV, D).
// sums (B, H, T): log2 of the sum of 2^score. Gives 1 where no code is there for `size`.
int attention(const float* q, const float* k, const float* v, float* out, float* sums,
              int64_t batch, int64_t length, int64_t heads, int64_t kv, int64_t size, int threads) {
  const float scale = LOG2E / std::sqrt(static_cast<float>(size));
  const Shape s{batch, length, heads, kv};
#define CALL(D) return attend<D>(q, k, v, out, sums, s, scale, threads), 0
  BY_HEAD_SIZE(CALL)
#undef CALL
}

int attention_back(const float* q, const float* k, const float* v, const float* out,
                   const float* sums, const float* upstream, float* dq, float* dk, float* dv,
                   int64_t batch, int64_t length, int64_t heads, int64_t kv, int64_t size,
                   int threads) {
  const float scale = LOG2E / std::sqrt(static_cast<float>(size));
  const Shape s{batch, length, heads, kv};
#define CALL(D) \
  return attend_back<D>(q, k, v, out, sums, upstream, dq, dk, dv, s, scale, threads), 0
  BY_HEAD_SIZE(CALL)
#undef CALL
}

// A block of logits in bits (rows, columns), float32 or bf16, becomes 2^(z - top), 0 where own
// (rows,) says. top and total (rows,), the largest so far and the sum relative to it, go on; so does
// mean (rows, width), which shrinks as top grows, unless it is null.
void exponentials_float32(float* z, int64_t rows, int64_t columns, const int64_t* own, float* top,
                          float* total, float* mean, int64_t width, int threads) {
  exponentials<Wide>(z, rows, columns, own, top, total, mean, width, threads);
}
void exponentials_bfloat16(uint16_t* z, int64_t rows, int64_t columns, const int64_t* own,
                           float* top, float* total, float* mean, int64_t width, int threads) {
  exponentials<Narrow>(z, rows, columns, own, top, total, mean, width, threads);
}

// silu(gate) * value, of n numbers each, float32 or bf16
void swiglu_float32(const float* gate, const float* value, float* out, int64_t n, int threads) {
  swiglu<Wide>(gate, value, out, n, threads);
}
void swiglu_bfloat16(const uint16_t* gate, const uint16_t* value, uint16_t* out, int64_t n,
                     int threads) {
  swiglu<Narrow>(gate, value, out, n, threads);
}
void swiglu_back_float32(const float* gate, const float* value, const float* upstream,
                         float* d_gate, float* d_value, int64_t n, int threads) {
  swiglu_back<Wide>(gate, value, upstream, d_gate, d_value, n, threads);
}
void swiglu_back_bfloat16(const uint16_t* gate, const uint16_t* value, const uint16_t* upstream,
                          uint16_t* d_gate, uint16_t* d_value, int64_t n, int threads) {
  swiglu_back<Narrow>(gate, value, upstream, d_gate, d_value, n, threads);
}

// y (rows, out) += scale * b a dropout(x): x (rows, in), a (rank, in), b (out, rank), all of x and y
// float32 or bf16; in and out are multiples of 16. low (rows, rank padded to 16) is a dropout(x).
// `cut` of 65536 entries is kept, each scaled by nothing. Sequences have `tokens` rows each.
#define ADAPT(name, F, T)                                                                         \
  void adapt_##name(const T* x, const float* a, const float* b, T* y, float* low, int64_t rows,   \
                    int64_t in, int64_t out, int64_t rank, float scale, uint64_t seed,            \
                    int64_t cut, int64_t tokens, int64_t stride, int threads) {                   \
    adapt<F>(x, a, b, y, low, {rows, in, out, rank}, scale, {seed, cut, tokens, stride}, threads);\
  }                                                                                               \
  void adapt_back_##name(const T* x, const float* a, const float* b, const float* low,            \
                         const T* upstream, T* dx, float* da, float* db, int64_t rows,            \
                         int64_t in, int64_t out, int64_t rank, float scale, uint64_t seed,       \
                         int64_t cut, int64_t tokens, int64_t stride, int threads) {              \
    adapt_back<F>(x, a, b, low, upstream, dx, da, db, {rows, in, out, rank}, scale,               \
                  {seed, cut, tokens, stride}, threads);                                          \
  }
ADAPT(float32, Wide, float)
ADAPT(bfloat16, Narrow, uint16_t)

// x / rms(x) * weight: x and out (rows, width); inverse (rows,) is 1 / rms
void rms_norm(const float* x, const float* weight, float* out, float* inverse, int64_t rows,
              int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = x + i * width;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < width; ++c) squares += row[c] * row[c];
    const float by = inverse[i] = 1.0f / std::sqrt(squares / width + eps);
    for (int64_t c = 0; c < width; ++c) out[i * width + c] = row[c] * by * weight[c];
  }
}

void rms_norm_back(const float* x, const float* weight, const float* inverse, const float* upstream,
                   float* dx, float* d_weight, int64_t rows, int64_t width, int threads) {
  const int64_t size = piece_of(rows), pieces = (rows + size - 1) / size;
  const Room sums = room(pieces * width);
#pragma omp parallel for num_threads(threads)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    float* own = sums.get() + piece * width;
    for (int64_t i = piece * size; i < std::min(rows, (piece + 1) * size); ++i) {
      const float *row = x + i * width, *g = upstream + i * width, by = inverse[i];
      float along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t c = 0; c < width; ++c) along += row[c] * g[c] * weight[c];
      along *= by * by * by / width;
      for (int64_t c = 0; c < width; ++c) {
        dx[i * width + c] = g[c] * weight[c] * by - row[c] * along;
        own[c] += g[c] * row[c] * by;
      }
    }
  }
  std::fill_n(d_weight, width, 0.0f);
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t c = 0; c < width; ++c) d_weight[c] += sums[piece * width + c];
}

// Pairs (x[2i], x[2i+1]) of x (B * T * heads, size) turned by table (T, size / 2, 2), cosine and
// sine of the angle; `sign` -1 turns back.
void rotate(const float* x, const float* table, float* out, int64_t batch, int64_t length,
            int64_t heads, int64_t size, float sign, int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t at = 0; at < batch * length; ++at) {
    const float* turn = table + at % length * size;
    for (int64_t h = 0; h < heads; ++h) {
      const float* in = x + (at * heads + h) * size;
      float* to = out + (at * heads + h) * size;
      for (int64_t i = 0; i < size; i += 2) {
        const float c = turn[i], s = turn[i + 1] * sign;
        to[i] = in[i] * c - in[i + 1] * s;
        to[i + 1] = in[i] * s + in[i + 1] * c;
      }
    }
  }
}

}  // extern "C"
