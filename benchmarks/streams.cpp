// Two ceilings, between the engine's two barriers; they check nothing.
//
// step(): the step's memory streams in one loop, as an expert would write it by hand for this very problem: float32, SGD
// with momentum or Adam, the local displacement or none, one worker for each process. step.py compares the engine with it.
//
// pass_over(): any number of streams that are read, updated in place and written, with as little arithmetic as that
// takes. rules.py compares each pass of a rule with it.
//
// hand_written.py compiles this file with -O3 -march=native and calls it on memory that the processes share.

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

using Vector = float __attribute__((vector_size(kBytes)));
constexpr std::int64_t kStep = kBytes / 4;

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }

// Past the cache, where the processor can.
void stream(float* to, Vector value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
#elif defined(__AVX2__)
  _mm256_stream_ps(to, reinterpret_cast<__m256>(value));
#elif defined(__SSE2__)
  _mm_stream_ps(to, reinterpret_cast<__m128>(value));
#else
  store(to, value);
#endif
}

Vector root(Vector value) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(_mm512_sqrt_ps(reinterpret_cast<__m512>(value)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(_mm256_sqrt_ps(reinterpret_cast<__m256>(value)));
#else
  for (int i = 0; i < kStep; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

struct alignas(64) Barrier {
  std::atomic<std::uint32_t> arrived{0};
  alignas(64) std::atomic<std::uint32_t> round{0};
};

}  // namespace

extern "C" {

// The arguments, as hand_written.py fills them in; arrays lie in shared memory and are aligned to 64 bytes.
struct Problem {
  void* barrier;
  std::int64_t processes;
  std::int64_t begin, end;     // of this process's shard, multiples of 16
  const float* const* grads;   // of each process
  float* const* points;        // where each process evaluates its next gradient; one for all without displacement
  float* w;
  float* slots[2];             // momentum; or the two moments
  float lr, momentum, gamma;   // lr, beta1 and the displacement
  float beta2, eps, correction1, correction2;
  std::int32_t adam, displaced, past_cache;
  std::int64_t ahead;          // elements between the prefetched line and the one in hand; 0: no prefetching
};

// The streams of one pass, as ceiling.py fills them in; aligned as above.
struct Streams {
  void* barrier;
  std::int64_t processes;
  std::int64_t begin, end;
  const float* const* read;
  std::int64_t reads;
  float* const* updated;
  std::int64_t updates;
  float* const* written;
  std::int64_t writes;
  std::int32_t past_cache;
  std::int64_t ahead;  // elements between the prefetched line and the one in hand; 0: no prefetching
};

void wait_for_all(void* where, std::int64_t processes) {
  Barrier& barrier = *static_cast<Barrier*>(where);
  const std::uint32_t round = barrier.round.load(std::memory_order_relaxed);
  if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(processes)) {
    barrier.arrived.store(0, std::memory_order_relaxed);
    barrier.round.store(round + 1, std::memory_order_release);
    return;
  }
  while (barrier.round.load(std::memory_order_acquire) == round) pause_briefly();
}

}  // extern "C"

namespace {

template <int kProcesses, bool kAdam, bool kDisplaced, bool kPastCache>
void walk(const Problem& p) {
  const int processes = kProcesses > 0 ? kProcesses : static_cast<int>(p.processes);
  constexpr int kMost = kProcesses > 0 ? kProcesses : 64;
  const float *grads[kMost];
  float* points[kMost];
  for (int k = 0; k < processes; ++k) grads[k] = p.grads[k], points[k] = p.points[k];
  float *const w = p.w, *const m = p.slots[0], *const v = p.slots[1];
  const Vector scale = Vector{} + 1.0f / static_cast<float>(processes);
  for (std::int64_t i = p.begin; i < p.end; i += kStep) {
    if (p.ahead) {
      for (int k = 0; k < processes; ++k) __builtin_prefetch(grads[k] + i + p.ahead, 0, 3);
      __builtin_prefetch(w + i + p.ahead, 1, 3);
      __builtin_prefetch(m + i + p.ahead, 1, 3);
      if (kAdam) __builtin_prefetch(v + i + p.ahead, 1, 3);
    }
    Vector g[kMost], sum = g[0] = load(grads[0] + i);
    for (int k = 1; k < processes; ++k) sum += g[k] = load(grads[k] + i);
    const Vector mean = sum * scale;
    Vector weight = load(w + i);
    if (kAdam) {
      const Vector first = load(m + i) * p.momentum + mean * (1 - p.momentum);
      const Vector second = load(v + i) * p.beta2 + mean * mean * (1 - p.beta2);
      store(m + i, first);
      store(v + i, second);
      weight -= p.lr * (first * p.correction1) / (root(second * p.correction2) + p.eps);
    } else {
      const Vector momentum = load(m + i) * p.momentum + mean;
      store(m + i, momentum);
      weight -= p.lr * momentum;
    }
    if (!kDisplaced) {  // all processes read w itself
      store(w + i, weight);
      continue;
    }
    store(w + i, weight);
    for (int k = 0; k < processes; ++k) {
      const Vector point = weight - p.gamma * g[k];
      kPastCache ? stream(points[k] + i, point) : store(points[k] + i, point);
    }
  }
}

// Block by block, so that every stream has a few lines in a row: what is read is added up, and the sum goes into what
// is updated and what is written.
template <bool kPastCache>
void walk_streams(const Streams& s) {
  constexpr std::int64_t kBlock = 64;
  for (std::int64_t begin = s.begin; begin < s.end; begin += kBlock) {
    const std::int64_t count = s.end - begin < kBlock ? s.end - begin : kBlock;
    alignas(64) float sum[kBlock] = {};
    const auto each_line = [&](const float* stream, auto work) {
      for (std::int64_t i = 0; i < count; i += kStep) {
        if (s.ahead) __builtin_prefetch(stream + begin + i + s.ahead, 0, 3);
        work(i);
      }
    };
    for (std::int64_t k = 0; k < s.reads; ++k)
      each_line(s.read[k], [&](std::int64_t i) { store(sum + i, load(sum + i) + load(s.read[k] + begin + i)); });
    for (std::int64_t k = 0; k < s.updates; ++k)
      each_line(s.updated[k], [&](std::int64_t i) {
        float* const at = s.updated[k] + begin + i;
        store(at, load(at) * 0.5f + load(sum + i));
      });
    for (std::int64_t k = 0; k < s.writes; ++k)
      for (std::int64_t i = 0; i < count; i += kStep) {
        float* const at = s.written[k] + begin + i;
        kPastCache ? stream(at, load(sum + i)) : store(at, load(sum + i));
      }
  }
}

template <int kProcesses, bool kAdam>
void choose(const Problem& p) {
  if (!p.displaced) return walk<kProcesses, kAdam, false, false>(p);
  p.past_cache ? walk<kProcesses, kAdam, true, true>(p) : walk<kProcesses, kAdam, true, false>(p);
}

}  // namespace

extern "C" {

// The walk over the shard alone.
void walk_shard(const Problem* p) {
  if (p->processes == 2)
    p->adam ? choose<2, true>(*p) : choose<2, false>(*p);
  else
    p->adam ? choose<0, true>(*p) : choose<0, false>(*p);
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void step(const Problem* p) {
  wait_for_all(p->barrier, p->processes);
  walk_shard(p);
  wait_for_all(p->barrier, p->processes);
}

void pass_over(const Streams* s) {
  wait_for_all(s->barrier, s->processes);
  s->past_cache ? walk_streams<true>(*s) : walk_streams<false>(*s);
#if defined(__SSE2__)
  _mm_sfence();
#endif
  wait_for_all(s->barrier, s->processes);
}

int vector_bytes() { return kBytes; }
}
