// Sparse kernels for CPUs: selection on tiles of pre-activations, sums and products of gathered rows.
//
// No library beyond the C++ runtime and OpenMP. The OpenMP symbols are left to be found in the process, where
// PyTorch's runtime already is: a second one would spin against it. Vectors are GCC vector extensions; the one
// intrinsic (a mask of comparisons) has a plain fallback. Functions that can fail return a negative number; all give
// the same result for any number of threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <vector>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, UNROLL = 16;
#elif defined(__AVX__)
constexpr int LANES = 8, UNROLL = 8;
#else
constexpr int LANES = 4, UNROLL = 8;
#endif
constexpr int MAXIMA = 8;  // vectors of running maxima
constexpr int64_t AHEAD = 4;  // gathered rows to fetch before they are needed
constexpr int64_t OUT_OF_MEMORY = -1, OUT_OF_RANGE = -2, INCOMPLETE = -3;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Mask __attribute__((vector_size(LANES * 4)));
typedef uint32_t Wide __attribute__((vector_size(LANES * 4)));
typedef uint16_t Narrow __attribute__((vector_size(LANES * 2)));
typedef uint16_t bfloat;

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Vector load(const bfloat* from) {
  Narrow narrow;
  std::memcpy(&narrow, from, sizeof narrow);
  const Wide wide = __builtin_convertvector(narrow, Wide) << 16;
  Vector v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

inline float one(const float* from) { return *from; }

inline float one(const bfloat* from) {
  const uint32_t wide = static_cast<uint32_t>(*from) << 16;
  float v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

inline float total(Vector v) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += v[i];
  return sum;
}

inline uint32_t above(Vector v, Vector bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)bound, _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)bound, _CMP_GT_OQ)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < LANES; i++) mask |= static_cast<uint32_t>(v[i] > bound[i]) << i;
  return mask;
#endif
}

// Parts are taken in turn by whichever thread is free: cores are shared, rows differ in length.
template <class F>
void parallel(int threads, int64_t parts, const F& work) {
#ifdef _OPENMP
  if (threads > 1 && parts > 1) {
    if (omp_get_max_threads() != threads) omp_set_num_threads(threads);
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
#pragma omp parallel
    {
      try {
        for (int64_t part; (part = next.fetch_add(1)) < parts;) work(part);
      } catch (...) {
        failed = true;
      }
    }
    if (failed) throw std::bad_alloc();
    return;
  }
#endif
  for (int64_t part = 0; part < parts; part++) work(part);
}

template <class F>
int64_t guarded(const F& work) {
  try {
    return work();
  } catch (...) {
    return OUT_OF_MEMORY;
  }
}

// First row of a part such that parts hold about equally many entries and rows.
int64_t first_row(const int64_t* crow, int64_t n, int64_t part, int64_t parts) {
  const int64_t goal = (crow[n] + n) * part / parts;
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (crow[middle] + middle < goal) low = middle + 1;
    else high = middle;
  }
  return low;
}

inline void prefetch(const float* row, int64_t d) {
  for (int64_t j = 0; j < d && j < 1024; j += 16) __builtin_prefetch(row + j);
}

bool in_range(const int64_t* index, int64_t entries, int64_t limit) {
  bool good = true;
  for (int64_t e = 0; e < entries; e++) good &= static_cast<uint64_t>(index[e]) < static_cast<uint64_t>(limit);
  return good;
}

template <int VECTORS>
inline void sum_block(const int64_t* index, const float* value, int64_t entries, const float* rows, int64_t d,
                      int64_t column, float* out) {
  Vector sums[VECTORS] = {};
  for (int64_t e = 0; e < entries; e++) {
    const float* row = rows + index[e] * d + column;
    if (e + AHEAD < entries) {
      const float* later = rows + index[e + AHEAD] * d + column;
      for (int v = 0; v < VECTORS; v++) __builtin_prefetch(later + v * LANES);
    }
    const Vector weight = value[e] - Vector{};
    for (int v = 0; v < VECTORS; v++) sums[v] += weight * load(row + v * LANES);
  }
  for (int v = 0; v < VECTORS; v++) store(out + column + v * LANES, sums[v]);
}

inline void sum_row(const int64_t* index, const float* value, int64_t entries, const float* rows, int64_t d,
                    float* out) {
  int64_t j = 0;
  for (; j + UNROLL * LANES <= d; j += UNROLL * LANES) sum_block<UNROLL>(index, value, entries, rows, d, j, out);
  for (; j + 4 * LANES <= d; j += 4 * LANES) sum_block<4>(index, value, entries, rows, d, j, out);
  for (; j + LANES <= d; j += LANES) sum_block<1>(index, value, entries, rows, d, j, out);
  for (; j < d; j++) {
    float sum = 0;
    for (int64_t e = 0; e < entries; e++) sum += value[e] * rows[index[e] * d + j];
    out[j] = sum;
  }
}

inline float dot(const float* left, const float* right, int64_t d) {
  Vector sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * LANES <= d; j += 4 * LANES)
    for (int v = 0; v < 4; v++) sums[v] += load(left + j + v * LANES) * load(right + j + v * LANES);
  for (; j + LANES <= d; j += LANES) sums[0] += load(left + j) * load(right + j);
  float rest = 0;
  for (; j < d; j++) rest += left[j] * right[j];
  return total((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

inline uint64_t key_of(float score, int64_t latent) {
  // Positive floats order as their bits do; the complement makes ties go to the smaller latent.
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(latent));
}

inline int64_t latent_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// Pre-activations of one token in a tile, and what ranks them.
template <class T>
struct Row {
  const T* product;
  const float *bias, *scale;
  int64_t m;

  inline Vector pre(int64_t j) const { return load(product + j) + load(bias + j); }
  inline float pre_one(int64_t j) const { return one(product + j) + bias[j]; }
  inline Vector score(int64_t j) const { return scale ? pre(j) * load(scale + j) : pre(j); }
  inline float score_one(int64_t j) const { return scale ? pre_one(j) * scale[j] : pre_one(j); }

  // Calls take(latent, score) for every score above the bound, by latent. This row is in the cache by now; the next
  // one, which follows it in the tile, is fetched meanwhile.
  template <class F>
  inline void each_above(float bound, const F& take) const {
    const Vector bounds = bound - Vector{};
    int64_t j = 0;
    for (; j + LANES <= m; j += LANES) {
      __builtin_prefetch(product + m + j);
      const Vector s = score(j);
      for (uint32_t mask = above(s, bounds); mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        take(j + lane, s[lane]);
      }
    }
    for (; j < m; j++)
      if (const float s = score_one(j); s > bound) take(j, s);
  }

  // A value below at least `wanted` scores: the maxima of groups of latents tell it without sorting. 0 if there are
  // fewer positive ones or too few groups.
  float lower_bound(int64_t wanted, std::vector<float>& maxima) const {
    const int64_t vectors = m / LANES, width = MAXIMA * LANES;
    int64_t segments = std::min((4 * wanted + width - 1) / width, m / (4 * width));
    if (segments < 1 || segments * width < wanted) return 0;
    maxima.resize(segments * width);
    for (int64_t segment = 0; segment < segments; segment++) {
      int64_t v = vectors * segment / segments;
      const int64_t end = vectors * (segment + 1) / segments;
      Vector best[MAXIMA] = {};
      for (; v + MAXIMA <= end; v += MAXIMA)
        for (int i = 0; i < MAXIMA; i++) {
          const Vector s = score((v + i) * LANES);
          best[i] = s > best[i] ? s : best[i];
        }
      for (int i = 0; v < end; v++, i++) {
        const Vector s = score(v * LANES);
        best[i] = s > best[i] ? s : best[i];
      }
      for (int i = 0; i < MAXIMA; i++) store(maxima.data() + segment * width + i * LANES, best[i]);
    }
    for (int64_t j = vectors * LANES, i = 0; j < m; j++, i++) maxima[i] = std::max(maxima[i], score_one(j));
    return bisect(maxima, wanted);
  }

  static float bisect(const std::vector<float>& maxima, int64_t wanted) {
    const int64_t vectors = static_cast<int64_t>(maxima.size()) / LANES;
    float low = 0, high = *std::max_element(maxima.begin(), maxima.end());
    for (int step = 0; step < 24; step++) {
      const float middle = low + (high - low) / 2;
      Mask larger = {};
      for (int64_t v = 0; v < vectors; v++) larger -= load(maxima.data() + v * LANES) > (middle - Vector{});
      int64_t count = 0;
      for (int i = 0; i < LANES; i++) count += larger[i];
      if (count < wanted) {
        high = middle;
        continue;
      }
      low = middle;
      if (count <= wanted + wanted / 8) break;
    }
    return low;
  }
};

// The k largest keys, largest first; returns how many there are.
int64_t order(std::vector<uint64_t>& keys, int64_t k, std::vector<uint64_t>& sorted) {
  const int64_t found = static_cast<int64_t>(keys.size());
  const int64_t kept = std::min(found, k);
  sorted.resize(kept);
  if (found > 192) {
    if (kept < found) std::nth_element(keys.begin(), keys.begin() + kept, keys.end(), std::greater<>());
    std::copy(keys.begin(), keys.begin() + kept, sorted.begin());
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    return kept;
  }
  // Counting the larger ones has no branch to mispredict.
  keys.resize((found + 7) / 8 * 8, 0);
  const uint64_t* all = keys.data();
  const int64_t padded = static_cast<int64_t>(keys.size());
  for (int64_t i = 0; i < found; i++) {
    uint64_t rank = 0;
    for (int64_t j = 0; j < padded; j++) rank += all[j] > all[i];
    if (rank < static_cast<uint64_t>(kept)) sorted[rank] = all[i];
  }
  return kept;
}

struct Exact {  // what an fp32 score of a candidate is computed from
  const float *x, *weight;
  int64_t d;
};

struct Scratch {
  std::vector<float> maxima, pre;
  std::vector<int64_t> proposed;
  std::vector<uint64_t> keys, sorted;
};

template <class T>
int64_t best_of(const Row<T>& row, int64_t wanted, Scratch& s) {
  s.keys.clear();
  row.each_above(row.lower_bound(wanted, s.maxima),
                 [&](int64_t latent, float score) { s.keys.push_back(key_of(score, latent)); });
  return order(s.keys, wanted, s.sorted);
}

// Ranks the candidates of one token by their fp32 scores; the keys that are left name a place among them, in which
// they stand by latent, so that ties still go to the smaller one.
template <class T>
int64_t refine(const Row<T>& row, int64_t found, int64_t k, const float* x, const Exact& exact, Scratch& s) {
  s.proposed.resize(found);
  s.pre.resize(found);
  for (int64_t i = 0; i < found; i++) s.proposed[i] = latent_of(s.sorted[i]);
  std::sort(s.proposed.begin(), s.proposed.end());
  s.keys.clear();
  for (int64_t i = 0; i < found; i++) {
    if (i + AHEAD < found) prefetch(exact.weight + s.proposed[i + AHEAD] * exact.d, exact.d);
    const int64_t latent = s.proposed[i];
    s.pre[i] = dot(x, exact.weight + latent * exact.d, exact.d) + row.bias[latent];
    const float score = row.scale ? s.pre[i] * row.scale[latent] : s.pre[i];
    if (score > 0) s.keys.push_back(key_of(score, i));
  }
  return order(s.keys, k, s.sorted);
}

template <class T>
void topk_rows(const T* tile, int64_t n, int64_t m, const float* bias, const float* scale, int64_t k, int64_t wanted,
               const Exact& exact, float* value, int64_t* index, int threads) {
  const int64_t rows = 16, parts = (n + rows - 1) / rows;
  parallel(threads, parts, [&](int64_t part) {
    thread_local Scratch s;
    for (int64_t i = part * rows; i < std::min(n, (part + 1) * rows); i++) {
      const Row<T> row{tile + i * m, bias, scale, m};
      int64_t found = best_of(row, wanted, s);
      if (exact.x) found = refine(row, found, k, exact.x + i * exact.d, exact, s);
      for (int64_t e = 0; e < k; e++) {
        const int64_t at = e < found ? latent_of(s.sorted[e]) : 0;
        index[i * k + e] = e < found && exact.x ? s.proposed[at] : at;
        value[i * k + e] = e < found ? (exact.x ? s.pre[at] : row.pre_one(at)) : 0;
      }
    }
  });
}

// Entries of the tokens seen so far, by token.
struct Batch {
  int64_t count;
  float start, bound, margin;
  std::vector<int64_t> crow{0};
  std::vector<int32_t> latent;
  std::vector<float> pre, score;

  int64_t held() const { return static_cast<int64_t>(pre.size()); }
};

// The count-th largest of positive numbers: a histogram of their leading bits, then one bin of it.
float cut_of(const std::vector<float>& score, int64_t count) {
  std::vector<int64_t> histogram(1 << 16, 0);
  const auto bin = [](float s) {
    uint32_t bits;
    std::memcpy(&bits, &s, sizeof bits);
    return bits >> 15 & 0xffff;
  };
  for (const float s : score) histogram[bin(s)]++;
  int64_t larger = 0;
  uint32_t at = 0xffff;
  while (larger + histogram[at] < count) larger += histogram[at--];
  std::vector<float> inside;
  for (const float s : score)
    if (bin(s) == at) inside.push_back(s);
  const auto nth = inside.begin() + (count - larger - 1);
  std::nth_element(inside.begin(), nth, inside.end(), std::greater<>());
  return *nth;
}

template <class F>
void keep_if(Batch& batch, const F& keep) {
  int64_t to = 0, from = 0;
  for (size_t row = 1; row < batch.crow.size(); row++) {
    for (const int64_t end = batch.crow[row]; from < end; from++) {
      if (!keep(from)) continue;
      batch.latent[to] = batch.latent[from];
      batch.pre[to] = batch.pre[from];
      batch.score[to++] = batch.score[from];
    }
    batch.crow[row] = to;
  }
  batch.latent.resize(to);
  batch.pre.resize(to);
  batch.score.resize(to);
}

// Appends what each part found, in order.
void append(Batch& batch, const std::vector<Batch>& parts) {
  for (const Batch& part : parts) {
    const int64_t before = batch.held();
    for (size_t row = 1; row < part.crow.size(); row++) batch.crow.push_back(before + part.crow[row]);
    batch.latent.insert(batch.latent.end(), part.latent.begin(), part.latent.end());
    batch.pre.insert(batch.pre.end(), part.pre.begin(), part.pre.end());
    batch.score.insert(batch.score.end(), part.score.begin(), part.score.end());
  }
}

template <class F>
void in_parts(Batch& batch, int64_t n, int threads, const F& add_row) {
  const int64_t count = std::min<int64_t>(n, 4 * threads);
  std::vector<Batch> parts(count);
  parallel(threads, count, [&](int64_t p) {
    for (int64_t i = n * p / count; i < n * (p + 1) / count; i++) {
      add_row(parts[p], i);
      parts[p].crow.push_back(parts[p].held());
    }
  });
  append(batch, parts);
}

template <class T>
void batch_add(Batch& batch, const T* tile, int64_t n, int64_t m, const float* bias, const float* scale,
               int threads) {
  const float bound = batch.bound;
  in_parts(batch, n, threads, [&](Batch& part, int64_t i) {
    const Row<T> row{tile + i * m, bias, scale, m};
    row.each_above(bound, [&](int64_t latent, float score) {
      part.latent.push_back(static_cast<int32_t>(latent));
      part.pre.push_back(scale ? row.pre_one(latent) : score);
      part.score.push_back(score);
    });
  });
  if (batch.held() <= 2 * batch.count) return;
  // Later entries that only equal this cut would lose to those already held.
  const float cut = batch.count ? cut_of(batch.score, batch.count) * (1 - batch.margin)
                                : std::numeric_limits<float>::infinity();
  keep_if(batch, [&](int64_t e) { return batch.score[e] >= cut && batch.count; });
  batch.bound = std::max(batch.bound, cut);
}

void batch_refine(Batch& batch, const Exact& exact, const float* bias, const float* scale, int threads) {
  const int64_t n = static_cast<int64_t>(batch.crow.size()) - 1, parts = 8 * threads;
  parallel(threads, parts, [&](int64_t part) {
    const int64_t end = first_row(batch.crow.data(), n, part + 1, parts);
    for (int64_t i = first_row(batch.crow.data(), n, part, parts); i < end; i++)
      for (int64_t e = batch.crow[i]; e < batch.crow[i + 1]; e++) {
        if (e + AHEAD < batch.held()) prefetch(exact.weight + batch.latent[e + AHEAD] * exact.d, exact.d);
        const int64_t latent = batch.latent[e];
        batch.pre[e] = dot(exact.x + i * exact.d, exact.weight + latent * exact.d, exact.d) + bias[latent];
        batch.score[e] = scale ? batch.pre[e] * scale[latent] : batch.pre[e];
      }
  });
  keep_if(batch, [&](int64_t e) { return batch.score[e] > 0; });
}

int64_t batch_finish(Batch& batch, const Exact& exact, const float* bias, const float* scale, int64_t* crow,
                     int64_t* index, float* value, float* smallest, int threads) {
  if (batch.start > 0 && batch.held() < batch.count) return INCOMPLETE;
  if (exact.x && batch.count && batch.held() >= batch.count) {
    const float low = cut_of(batch.score, batch.count) * (1 - batch.margin);
    if (low < batch.start) return INCOMPLETE;
    keep_if(batch, [&](int64_t e) { return batch.score[e] >= low; });
  }
  if (exact.x) batch_refine(batch, exact, bias, scale, threads);
  float cut = 0;
  int64_t room = 0;
  if (batch.held() > batch.count) {
    cut = batch.count ? cut_of(batch.score, batch.count) : std::numeric_limits<float>::infinity();
    room = batch.count;
    for (const float s : batch.score) room -= s > cut;
    if (!batch.count) room = 0;
  }
  *smallest = std::numeric_limits<float>::infinity();
  int64_t to = 0;
  for (size_t row = 0; row + 1 < batch.crow.size(); row++) {
    crow[row] = to;
    for (int64_t e = batch.crow[row]; e < batch.crow[row + 1]; e++) {
      if (!(batch.score[e] > cut) && !(batch.score[e] == cut && room-- > 0)) continue;
      index[to] = batch.latent[e];
      value[to++] = batch.pre[e];
      *smallest = std::min(*smallest, batch.score[e]);
    }
  }
  crow[batch.crow.size() - 1] = to;
  return to;
}

}  // namespace

extern "C" {

int64_t palimpsest_row_sum(const int64_t* crow, const int64_t* index, const float* value, const float* rows, int64_t n,
                           int64_t n_rows, int64_t d, float* out, int threads) {
  return guarded([&]() -> int64_t {
    if (!in_range(index, crow[n], n_rows)) return OUT_OF_RANGE;
    const int64_t parts = 8 * threads;
    parallel(threads, parts, [&](int64_t part) {
      const int64_t end = first_row(crow, n, part + 1, parts);
      for (int64_t i = first_row(crow, n, part, parts); i < end; i++)
        sum_row(index + crow[i], value + crow[i], crow[i + 1] - crow[i], rows, d, out + i * d);
    });
    return 0;
  });
}

int64_t palimpsest_row_dot(const int64_t* crow, const int64_t* index, const float* left, const float* right, int64_t n,
                           int64_t n_rows, int64_t d, float* out, int threads) {
  return guarded([&]() -> int64_t {
    if (!in_range(index, crow[n], n_rows)) return OUT_OF_RANGE;
    const int64_t parts = 8 * threads, entries = crow[n];
    parallel(threads, parts, [&](int64_t part) {
      const int64_t end = first_row(crow, n, part + 1, parts);
      for (int64_t i = first_row(crow, n, part, parts); i < end; i++)
        for (int64_t e = crow[i]; e < crow[i + 1]; e++) {
          if (e + AHEAD < entries) prefetch(right + index[e + AHEAD] * d, d);
          out[e] = dot(left + i * d, right + index[e] * d, d);
        }
    });
    return 0;
  });
}

// Counting sort: each part counts its rows' latents, then writes behind the parts before it.
int64_t palimpsest_by_latent(const int64_t* crow, const int64_t* index, int64_t n, int64_t n_latents,
                             int64_t* latent_crow, int64_t* token, int64_t* place, int threads) {
  return guarded([&]() -> int64_t {
    if (!in_range(index, crow[n], n_latents)) return OUT_OF_RANGE;
    const int64_t parts = threads;
    std::vector<std::vector<int64_t>> next(parts);
    parallel(threads, parts, [&](int64_t part) {
      next[part].assign(n_latents, 0);
      const int64_t end = crow[first_row(crow, n, part + 1, parts)];
      for (int64_t e = crow[first_row(crow, n, part, parts)]; e < end; e++) next[part][index[e]]++;
    });
    int64_t sum = 0;
    for (int64_t latent = 0; latent < n_latents; latent++) {
      latent_crow[latent] = sum;
      for (auto& counts : next) {
        const int64_t count = counts[latent];
        counts[latent] = sum;
        sum += count;
      }
    }
    latent_crow[n_latents] = sum;
    parallel(threads, parts, [&](int64_t part) {
      const int64_t end = first_row(crow, n, part + 1, parts);
      for (int64_t i = first_row(crow, n, part, parts); i < end; i++)
        for (int64_t e = crow[i]; e < crow[i + 1]; e++) {
          const int64_t to = next[part][index[e]]++;
          token[to] = i;
          place[to] = e;
        }
    });
    return 0;
  });
}

// `wanted` latents are proposed by the tile; with x, their fp32 scores decide which k are kept.
int64_t palimpsest_topk(const void* tile, int is_bfloat, int64_t n, int64_t m, const float* bias, const float* scale,
                        int64_t k, int64_t wanted, const float* x, const float* weight, int64_t d, float* value,
                        int64_t* index, int threads) {
  return guarded([&]() -> int64_t {
    const Exact exact{x, weight, d};
    if (is_bfloat)
      topk_rows(static_cast<const bfloat*>(tile), n, m, bias, scale, k, wanted, exact, value, index, threads);
    else
      topk_rows(static_cast<const float*>(tile), n, m, bias, scale, k, wanted, exact, value, index, threads);
    return 0;
  });
}

void* palimpsest_batch_new(int64_t count, float start, float margin) {
  Batch* batch = new (std::nothrow) Batch;
  if (batch) {
    batch->count = count;
    batch->start = batch->bound = start;
    batch->margin = margin;
  }
  return batch;
}

void palimpsest_batch_free(void* batch) { delete static_cast<Batch*>(batch); }

int64_t palimpsest_batch_add(void* batch, const void* tile, int is_bfloat, int64_t n, int64_t m, const float* bias,
                             const float* scale, int threads) {
  return guarded([&]() -> int64_t {
    Batch& held = *static_cast<Batch*>(batch);
    if (is_bfloat) batch_add(held, static_cast<const bfloat*>(tile), n, m, bias, scale, threads);
    else batch_add(held, static_cast<const float*>(tile), n, m, bias, scale, threads);
    return held.held();
  });
}

// Returns how many entries were kept; they are at most the count.
int64_t palimpsest_batch_finish(void* batch, const float* x, const float* weight, int64_t d, const float* bias,
                                const float* scale, int64_t* crow, int64_t* index, float* value, float* smallest,
                                int threads) {
  return guarded([&]() -> int64_t {
    return batch_finish(*static_cast<Batch*>(batch), Exact{x, weight, d}, bias, scale, crow, index, value, smallest,
                        threads);
  });
}

// Adds the pre-activations above a floor per latent, strongest first.
int64_t palimpsest_above_add(void* batch, const float* tile, int64_t n, int64_t m, const float* bias,
                             const float* floor, int threads) {
  return guarded([&]() -> int64_t {
    Batch& held = *static_cast<Batch*>(batch);
    in_parts(held, n, threads, [&](Batch& part, int64_t i) {
      thread_local Scratch s;
      s.keys.clear();
      const Row<float> row{tile + i * m, bias, nullptr, m};
      row.each_above(0, [&](int64_t latent, float pre) {
        if (pre > floor[latent]) s.keys.push_back(key_of(pre, latent));
      });
      order(s.keys, static_cast<int64_t>(s.keys.size()), s.sorted);
      for (const uint64_t key : s.sorted) {
        part.latent.push_back(static_cast<int32_t>(latent_of(key)));
        part.pre.push_back(row.pre_one(latent_of(key)));
      }
    });
    return held.held();
  });
}

void palimpsest_above_finish(void* batch, int64_t* crow, int64_t* index, float* value) {
  const Batch& held = *static_cast<Batch*>(batch);
  std::copy(held.crow.begin(), held.crow.end(), crow);
  std::copy(held.latent.begin(), held.latent.end(), index);
  std::copy(held.pre.begin(), held.pre.end(), value);
}

void palimpsest_normalise_rows(float* rows, int64_t n, int64_t d, int threads) {
  const int64_t step = 64;
  parallel(threads, (n + step - 1) / step, [&](int64_t part) {
    for (int64_t i = part * step; i < std::min(n, (part + 1) * step); i++) {
      float* row = rows + i * d;
      const float norm = __builtin_sqrtf(dot(row, row, d));
      if (norm == 0) continue;
      for (int64_t j = 0; j < d; j++) row[j] /= norm;
    }
  });
}

void palimpsest_project_rows(float* gradient, const float* rows, int64_t n, int64_t d, int threads) {
  const int64_t step = 64;
  parallel(threads, (n + step - 1) / step, [&](int64_t part) {
    for (int64_t i = part * step; i < std::min(n, (part + 1) * step); i++) {
      const float along = dot(gradient + i * d, rows + i * d, d);
      for (int64_t j = 0; j < d; j++) gradient[i * d + j] -= along * rows[i * d + j];
    }
  });
}
}
