// Drawing one token from each row of logits, and what follows from it for the next step of decoding, so that the host
// need not be asked between tokens.
//
// Tokens are ordered by falling weight exp((logit - largest) inverse_temperature), ties by rising id. Truncation and the
// draw all look for a place in that order: the first token at which a running count or mass reaches a bound. Nothing is
// sorted: a token's key holds the bits of its weight and then its inverted id, so the order is that of the keys, and the
// place is found digit by digit from a histogram of the tokens that share the digits found so far. Bins hold counts and
// sums of mantissas, which integer atomics add exactly in any order; a bin's tokens share their exponent.
#include "normalizer.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;
// Blocks of the vocabulary: up to 512 * 1024 entries.
constexpr int MAX_BLOCKS = 512;

using Key = unsigned long long;

constexpr int ID_BITS = 24;
constexpr Key LAST_ID = (Key(1) << ID_BITS) - 1;
// The digits of a key from the top: exponent, three of the mantissa, three of the id. SHIFTS has where each ends.
constexpr int LEVELS = 7;
constexpr int BINS = 256;
__device__ constexpr int SHIFTS[LEVELS] = {47, 39, 31, 24, 16, 8, 0};
__device__ constexpr int DIGIT_BITS[LEVELS] = {8, 8, 8, 7, 8, 8, 8};
// Histograms side by side, so that warps get less in each other's way.
constexpr int COPIES = 4;
// Tokens that are looked at without going through the whole row again.
constexpr int CAPACITY = 2048;
// Logits that a thread has under way at once.
constexpr int AHEAD = 4;

struct Bin {
    unsigned count;
    // Sums of the lower 12 and the upper 12 bits of mantissas, each below 2^32 for up to 2^20 tokens.
    unsigned low, high;
};

struct Choice {
    int bin;
    double before;
    unsigned count, count_through;
};

struct Scratch {
    BlockSums blocks[MAX_BLOCKS];
    Bin bins[COPIES][BINS];
    Key gathered[CAPACITY];
    int gathered_count;
    Choice choice;
    double total;
    Key found;
    int token;
};

// ------------------------------------------------------------------------------------------------------- the order

struct Row {
    const float* logits;
    int vocabulary;
    float largest, inverse_temperature;

    // 0 where single precision has no normal number for it, and for NaN.
    __device__ __forceinline__ float weight(float logit) const {
        const float exponent = (logit - largest) * inverse_temperature;
        return exponent >= -87.3f ? expf(exponent) : 0.0f;
    }
    __device__ __forceinline__ Key key(float logit, int id) const {
        return Key(__float_as_uint(weight(logit))) << ID_BITS | (LAST_ID - Key(id));
    }
};

__device__ __forceinline__ unsigned bits_of(Key key) { return unsigned(key >> ID_BITS); }
__device__ __forceinline__ int id_of(Key key) { return int(LAST_ID - (key & LAST_ID)); }

// Calls visit(key) for the row's tokens, or for those that were gathered (gathered >= 0), dealt to the block's threads.
template <typename Visit>
__device__ __forceinline__ void for_each(const Row& row, const Scratch& scratch, int gathered, Visit visit) {
    if (gathered >= 0) {
        for (int at = threadIdx.x; at < gathered; at += THREADS) visit(scratch.gathered[at]);
        return;
    }
    for (int first = threadIdx.x; first < row.vocabulary; first += AHEAD * THREADS) {
        float logits[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int id = first + i * THREADS;
            logits[i] = id < row.vocabulary ? row.logits[id] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int id = first + i * THREADS;
            if (id < row.vocabulary) visit(row.key(logits[i], id));
        }
    }
}

// What is looked for: the first place whose running measure (tokens, or mass) is at least `bound`, or above it.
struct Goal {
    bool counts, above;
    // A share of the whole measure until that is known.
    bool share;
    double bound;

    __device__ __forceinline__ bool reached(double measure) const { return above ? measure > bound : measure >= bound; }
};

struct Reached {
    int place;
    double before, total;
};

// The first of places 0..count at which `start` and the running sum of measure(place) reach the goal, else the last that
// measures anything, else -1; by a whole warp, each lane over a run of places. Sets a share to its amount.
template <typename Measure>
__device__ __forceinline__ Reached first_reaching(Goal& goal, int count, double start, Measure measure) {
    const int lane = threadIdx.x % WARP, run = (count + WARP - 1) / WARP;
    const int first = lane * run, end = min(count, first + run);
    double through = 0.0;
    for (int place = first; place < end; ++place) through += measure(place);
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const double lower = __shfl_up_sync(ALL_LANES, through, offset);
        if (lane >= offset) through += lower;
    }
    const double lower = __shfl_up_sync(ALL_LANES, through, 1), total = __shfl_sync(ALL_LANES, through, WARP - 1);
    if (goal.share) goal.bound *= total;
    goal.share = false;

    double running = start + (lane == 0 ? 0.0 : lower);
    Reached found{-1, 0.0, total};
    bool reached = false;
    for (int place = first; place < end && !reached; ++place) {
        const double own = measure(place);
        if (own > 0.0) {
            found.place = place;
            found.before = running;
            running += own;
            reached = goal.reached(running);
        }
    }
    const unsigned winners = __ballot_sync(ALL_LANES, reached), any = __ballot_sync(ALL_LANES, found.place >= 0);
    const int winner = winners != 0 ? __ffs(int(winners)) - 1 : any != 0 ? WARP - 1 - __clz(int(any)) : 0;
    found.place = __shfl_sync(ALL_LANES, found.place, winner);
    found.before = __shfl_sync(ALL_LANES, found.before, winner);
    return found;
}

// ------------------------------------------------------------------------------------------------------- histograms

__device__ __forceinline__ void clear(Bin (&bins)[COPIES][BINS]) {
    unsigned* words = &bins[0][0].count;
    for (int at = threadIdx.x; at < COPIES * BINS * 3; at += THREADS) words[at] = 0;
    __syncthreads();
}

__device__ __forceinline__ void add_to(Bin& bin, unsigned bits, bool counts) {
    atomicAdd(&bin.count, 1u);
    if (counts || bits < 0x800000u) return;
    const unsigned mantissa = (bits & 0x7fffffu) | 0x800000u;
    atomicAdd(&bin.low, mantissa & 0xfffu);
    atomicAdd(&bin.high, mantissa >> 12);
}

__device__ __forceinline__ unsigned count_of(const Bin (&bins)[COPIES][BINS], int bin) {
    unsigned count = 0;
    for (int copy = 0; copy < COPIES; ++copy) count += bins[copy][bin].count;
    return count;
}

// The exact mass of a bin whose tokens have this exponent.
__device__ __forceinline__ double mass_of(const Bin (&bins)[COPIES][BINS], int bin, int exponent) {
    unsigned low = 0, high = 0;
    for (int copy = 0; copy < COPIES; ++copy) {
        low += bins[copy][bin].low;
        high += bins[copy][bin].high;
    }
    return ldexp(double(high) * 4096.0 + double(low), exponent - 150);
}

// The bin, from the top, in which the goal is reached. By a whole warp; the result is in scratch.choice.
__device__ __forceinline__ void choose_bin(Scratch& scratch, Goal& goal, int level, Key prefix, double before) {
    const auto measure = [&](int place) {
        const int bin = BINS - 1 - place;
        if (goal.counts) return double(count_of(scratch.bins, bin));
        const int exponent = level == 0 ? bin : int(prefix >> (SHIFTS[0] - SHIFTS[level - 1]));
        return mass_of(scratch.bins, bin, exponent);
    };
    const Reached reached = first_reaching(goal, BINS, before, measure);
    unsigned through = 0;
    for (int place = threadIdx.x % WARP; place <= reached.place; place += WARP) {
        through += count_of(scratch.bins, BINS - 1 - place);
    }
    through = __reduce_add_sync(ALL_LANES, through);
    if (threadIdx.x % WARP != 0) return;
    const int bin = BINS - 1 - reached.place;
    const unsigned count = reached.place < 0 ? 0 : count_of(scratch.bins, bin);
    scratch.choice = {reached.place < 0 ? -1 : bin, reached.before, count, through};
    if (level == 0) scratch.total = reached.total;
}

// --------------------------------------------------------------------------------------------------------- selection

struct Selection {
    // The key of the token that was found; 0 where no token has a weight.
    Key key;
    // The measure of all tokens that were looked at.
    double total;
};

// Finds a place in the order of the tokens whose keys are not below `cut`. Once few enough tokens can be meant by this and
// all later calls, they are gathered: later cuts are never below what this call finds.
__device__ __forceinline__ Selection select(const Row& row, Scratch& scratch, int& gathered, Key cut, Goal goal) {
    Key prefix = 0;
    double before = 0.0;
    int shift = 64;
    unsigned count = 2;
#pragma unroll 1
    for (int level = 0; level < LEVELS && count > 1; ++level) {
        const int next = SHIFTS[level], mask = (1 << DIGIT_BITS[level]) - 1;
        Bin* bins = scratch.bins[threadIdx.x / WARP % COPIES];
        clear(scratch.bins);
        for_each(row, scratch, gathered, [&](Key key) {
            if (key >= cut && (level == 0 || key >> shift == prefix)) {
                add_to(bins[int(key >> next) & mask], bits_of(key), goal.counts);
            }
        });
        __syncthreads();
        if (threadIdx.x < WARP) choose_bin(scratch, goal, level, prefix, before);
        if (threadIdx.x == 0) scratch.gathered_count = 0;
        __syncthreads();
        const Choice choice = scratch.choice;
        if (choice.bin < 0) return {0, 0.0};
        goal.share = false;
        prefix = prefix << DIGIT_BITS[level] | Key(choice.bin);
        shift = next;
        before = choice.before;
        count = choice.count;
        if (level == 0 && gathered < 0 && choice.count_through <= unsigned(CAPACITY)) {
            const Key lowest = max(cut, prefix << shift);
            for_each(row, scratch, gathered, [&](Key key) {
                if (key >= lowest) scratch.gathered[atomicAdd(&scratch.gathered_count, 1)] = key;
            });
            gathered = int(choice.count_through);
            __syncthreads();
        }
    }
    for_each(row, scratch, gathered, [&](Key key) {
        if (key >= cut && key >> shift == prefix) scratch.found = key;
    });
    __syncthreads();
    return {scratch.found, scratch.total};
}

// The token drawn from what top-k, top-p and min-p leave, each applied to what the one before left, and the mass of that.
__device__ __forceinline__ Selection draw_truncated(const Row& row, Scratch& scratch, int top_k, float top_p,
                                                    float min_p, double uniform) {
    enum { TOP_K, TOP_P, DRAW, STAGES };
    Selection selection{0, 0.0};
    Key cut = 0;
    int gathered = -1;
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) {
        if (stage == TOP_K && (top_k <= 0 || top_k >= row.vocabulary)) continue;
        if (stage == TOP_P && top_p >= 1.0f) continue;
        // The largest weight is 1.
        if (stage == DRAW && min_p > 0.0f) cut = max(cut, Key(__float_as_uint(fminf(min_p, 1.0f))) << ID_BITS);
        const Goal goal = stage == TOP_K   ? Goal{true, false, false, double(top_k)}
                          : stage == TOP_P ? Goal{false, false, true, double(top_p)}
                                           : Goal{false, true, true, uniform};
        selection = select(row, scratch, gathered, cut, goal);
        cut = max(cut, selection.key);
    }
    return selection;
}

// --------------------------------------------------------------------------------------------------------- whole rows

// The first token with the largest logit, by a whole warp.
__device__ __forceinline__ int argmax(const Row& row, const BlockSums* sums, int blocks) {
    const unsigned lane = threadIdx.x % WARP, none = 0xffffffffu;
    unsigned block = none;
    for (unsigned at = lane; at < unsigned(blocks) && block == none; at += WARP) {
        if (sums[at].largest == row.largest) block = at;
    }
    block = __reduce_min_sync(ALL_LANES, block);
    if (block == none) return 0;
    const unsigned first = block * VOCABULARY_BLOCK, end = min(first + VOCABULARY_BLOCK, unsigned(row.vocabulary));
    unsigned token = none;
    for (unsigned id = first + lane; id < end && token == none; id += WARP) {
        if (row.logits[id] == row.largest) token = id;
    }
    token = __reduce_min_sync(ALL_LANES, token);
    return token == none ? 0 : int(token);
}

// The token of the whole row, in order of ids, at which the running mass passes `uniform` of all; by a whole warp. The
// mass of the blocks comes from the normaliser's sums; only the block that is hit is looked at again.
__device__ __forceinline__ int draw_untruncated(const Row& row, const BlockSums* sums, int blocks, double uniform) {
    Goal goal{false, true, true, uniform};
    const Reached block = first_reaching(goal, blocks, 0.0, [&](int at) {
        return double(sums[at].tempered) * double(row.weight(sums[at].largest));
    });
    if (block.place < 0) return 0;
    const int first = block.place * VOCABULARY_BLOCK, count = min(VOCABULARY_BLOCK, row.vocabulary - first);
    const Reached token = first_reaching(goal, count, block.before, [&](int at) {
        return double(row.weight(row.logits[first + at]));
    });
    return first + max(token.place, 0);
}

// ------------------------------------------------------------------------------------------------- the random number

// One step of SplitMix64, as in src/random.rs.
__device__ __forceinline__ unsigned long long mix(unsigned long long value) {
    value += 0x9e3779b97f4a7c15ull;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}

// Value n of the stream with this key, uniform in [0, 1).
__device__ __forceinline__ double uniform_of(unsigned long long key, unsigned long long n) {
    return double(mix(key + n * 0x9e3779b97f4a7c15ull) >> 11) / 9007199254740992.0;
}

// ------------------------------------------------------------------------------------------------------------ kernels

// Draws a token for every row's reply replies[row] that is not finished (finishes[reply] == 0), with the random number
// lengths[reply] of the stream keys[reply], from the logits of row sources[row] (row itself where sources is null).
// Writes the token and its log-probabilities under the model at temperature 1, under the tempered model (the policy), and
// under the distribution that it was drawn from. greedy != 0 takes the most probable token; then the inverse temperature
// must be 1. top_k 0, top_p 1 and min_p 0 truncate nothing. vocabulary is at most 524288.
// Launch: grid (rows), block (512).
extern "C" __global__ void __launch_bounds__(THREADS)
    sample_tokens(const float* __restrict__ logits, const int* __restrict__ sources, int vocabulary,
                  const int* __restrict__ replies, const unsigned long long* __restrict__ keys,
                  const int* __restrict__ lengths, const int* __restrict__ finishes, int greedy,
                  float inverse_temperature, int top_k, float top_p, float min_p, unsigned* __restrict__ tokens,
                  float* __restrict__ logprobs, float* __restrict__ policy_logprobs,
                  float* __restrict__ sampling_logprobs) {
    __shared__ Scratch scratch;
    const int reply = replies[blockIdx.x];
    if (finishes[reply] != 0) return;
    const size_t source = sources != nullptr ? sources[blockIdx.x] : blockIdx.x;
    Row row{logits + source * vocabulary, vocabulary, 0.0f, inverse_temperature};
    const int blocks = (vocabulary + VOCABULARY_BLOCK - 1) / VOCABULARY_BLOCK, warp = threadIdx.x / WARP;
    for (int block = warp; block < blocks; block += WARPS) {
        const int first = block * VOCABULARY_BLOCK, count = min(VOCABULARY_BLOCK, vocabulary - first);
        const bool whole = whole_vectors<4>(count, vocabulary, logits);
        const auto sums = sums_of_block(row.logits + first, count, inverse_temperature, whole);
        if (threadIdx.x % WARP == 0) scratch.blocks[block] = sums;
    }
    __syncthreads();
    const auto normalizer = normalizer_of(scratch.blocks, blocks, inverse_temperature);
    row.largest = normalizer.largest;

    const double uniform = uniform_of(keys[reply], lengths[reply]);
    const bool truncates = greedy == 0 && (top_k > 0 || top_p < 1.0f || min_p > 0.0f);
    Selection drawn{0, 0.0};
    if (truncates) {
        drawn = draw_truncated(row, scratch, top_k, top_p, min_p, uniform);
        if (threadIdx.x == 0) scratch.token = drawn.key == 0 ? 0 : id_of(drawn.key);
    } else if (warp == 0) {
        const int token = greedy != 0 ? argmax(row, scratch.blocks, blocks)
                                      : draw_untruncated(row, scratch.blocks, blocks, uniform);
        if (threadIdx.x == 0) scratch.token = token;
    }
    if (threadIdx.x != 0) return;
    const int token = scratch.token;
    const float logit = row.logits[token];
    const float policy_logprob = normalizer.policy_logprob(logit, inverse_temperature);
    const double weight = double(__uint_as_float(bits_of(drawn.key)));
    tokens[blockIdx.x] = unsigned(token);
    logprobs[blockIdx.x] = normalizer.logprob(logit);
    policy_logprobs[blockIdx.x] = policy_logprob;
    sampling_logprobs[blockIdx.x] = greedy != 0 ? 0.0f : truncates ? float(log(weight / drawn.total)) : policy_logprob;
}

// How a reply ended; a stop string (3) is found by the host.
constexpr int LIVE = 0, END_TOKEN = 1, TOO_LONG = 2;
constexpr int PAGE = 16;

// Counts the drawn tokens of unfinished replies, finishes those that drew an end token or are `capacity` long, and says what
// the next forward pass reads for each row: the token, its position (starts[reply] tokens precede the reply), its slot in the
// cache, page * 16 + lane, from the reply's row of page_table[replies, pages_per_reply], and how many positions of the reply
// it attends to, its own included. A reply that ends has slot -1 and attends to what is in the cache; later launches change
// nothing of it.
// Launch: grid (ceil(rows / 128)), block (128).
extern "C" __global__ void __launch_bounds__(128)
    advance_replies(const int* __restrict__ replies, const unsigned* __restrict__ tokens,
                    const unsigned* __restrict__ end_tokens, int end_token_count, int capacity,
                    const int* __restrict__ starts, const int* __restrict__ page_table, int pages_per_reply,
                    int* __restrict__ lengths, int* __restrict__ finishes, unsigned* __restrict__ next_ids,
                    int* __restrict__ next_positions, int* __restrict__ next_slots, unsigned* __restrict__ next_lengths,
                    int rows) {
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const int reply = replies[row];
    if (finishes[reply] != LIVE) {
        // The host may have ended it.
        next_slots[row] = -1;
        return;
    }
    const int at = lengths[reply];
    const unsigned token = tokens[row];
    lengths[reply] = at + 1;

    int finish = at + 1 >= capacity ? TOO_LONG : LIVE;
    for (int end = 0; end < end_token_count; ++end) {
        if (token == end_tokens[end]) finish = END_TOKEN;
    }
    finishes[reply] = finish;
    next_ids[row] = token;
    next_positions[row] = starts[reply] + at;
    const bool live = finish == LIVE;
    const int page = live ? page_table[size_t(reply) * pages_per_reply + at / PAGE] : 0;
    next_slots[row] = live ? page * PAGE + at % PAGE : -1;
    next_lengths[row] = unsigned(live ? at + 1 : at);
}
