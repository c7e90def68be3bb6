#include "sample_step.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "parallel.h"
#include "philox.h"

namespace stars_fast {

namespace {

constexpr int kBlocks = kTile / 4;     // Philox blocks of one tile
constexpr int kBins = 2048;            // of the histogram for top-p; the last one holds all that is 32 nats down
constexpr float kBinsPerNat = 64.0f;

// The row that a thread works on: logits padded with -inf to whole tiles, and the sums of each tile.
struct Row {
    std::vector<float> x;
    std::vector<TileSums> tiles;
    std::vector<float> chosen;  // candidates for a threshold
    RowSums sums;

    float* tile(size_t t) { return x.data() + t * kTile; }
    bool reaches(size_t t, float threshold) const { return tiles[t].max >= threshold; }

    void load(const void* logits, Float type, int64_t row, int64_t vocab) {
        const int64_t count = (vocab + kTile - 1) / kTile;
        x.resize(count * kTile);
        tiles.resize(count);
        for (int64_t t = 0; t < count; ++t) {
            load_tile(logits, type, row * vocab + t * kTile, std::min(kTile, vocab - t * kTile), tile(t));
        }
    }
    void add_up() {
        sums = {};
        for (size_t t = 0; t < tiles.size(); ++t) {
            tiles[t] = tile_sums(tile(t));
            sums.add(tiles[t]);
        }
    }
};

float logit_at(const void* logits, Float type, int64_t index) {
    if (type == Float::k32) return static_cast<const float*>(logits)[index];
    const uint16_t bits = static_cast<const uint16_t*>(logits)[index];
    return type == Float::k16 ? from_half(bits) : from_bf16(bits);
}

STARS_FAST_CLONES void divide(float* x, int64_t count, float divisor) {
    for (int64_t i = 0; i < count; ++i) x[i] /= divisor;
}

void penalise(float* x, const bool* seen, int64_t vocab, float penalty) {
    for (int64_t i = 0; i < vocab; ++i) {
        if (seen[i]) x[i] = x[i] < 0 ? x[i] * penalty : x[i] / penalty;
    }
}

STARS_FAST_CLONES void mask_below(float* x, float threshold) {
    for (int64_t i = 0; i < kTile; ++i) x[i] = x[i] >= threshold ? x[i] : -HUGE_VALF;
}

// The k-th largest logit, or -inf where there are fewer finite ones. Keeps a few times k candidates and raises the bar.
float kth_largest(Row& row, int64_t k) {
    float bar = -HUGE_VALF;
    auto& best = row.chosen;
    best.clear();
    const auto raise = [&] {
        std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), std::greater<float>());
        best.resize(k);
        bar = best[k - 1];
    };
    for (size_t t = 0; t < row.tiles.size(); ++t) {
        if (!(row.tiles[t].max > bar)) continue;
        const float* x = row.tile(t);
        for (int64_t i = 0; i < kTile; ++i) {
            if (x[i] > bar) best.push_back(x[i]);
        }
        if (static_cast<int64_t>(best.size()) >= 4 * k) raise();
    }
    if (static_cast<int64_t>(best.size()) < k) return -HUGE_VALF;
    raise();
    return bar;
}

// Probability relative to the top logit, and histogram bin, of one tile's logits that reach `floor`.
STARS_FAST_CLONES void weigh(const float* x, float top, float floor, float* weights, int32_t* bins) {
    for (int64_t i = 0; i < kTile; ++i) {
        const float down = (top - x[i]) * kBinsPerNat;
        bins[i] = static_cast<int32_t>(down < kBins - 1 ? down : kBins - 1);
        weights[i] = x[i] >= floor ? exp_nonpositive(x[i] - top) : 0.0f;
    }
}

// First of the values, in descending order, at which `before` plus the weights up to it reach `wanted`.
float weighted_select(std::vector<float>& values, float top, double before, double wanted) {
    auto low = values.begin(), high = values.end();
    while (high - low > 1) {
        const auto middle = low + (high - low) / 2;
        std::nth_element(low, middle, high, std::greater<float>());
        double mass = 0;
        for (auto value = low; value != middle; ++value) mass += exp_nonpositive(*value - top);
        if (before + mass >= wanted) {
            high = middle;
        } else {
            before += mass;
            low = middle;
        }
    }
    return *low;
}

// The smallest logit that top-p keeps among those that reach `floor`: a histogram finds the bin in which the mass of
// the more probable ones reaches top_p, and a selection in that bin finds the logit. Exact, and nothing is sorted.
float nucleus_threshold(Row& row, float floor, float top_p) {
    const float top = static_cast<float>(row.sums.max);
    std::vector<double> mass(kBins);
    float weights[kTile];
    int32_t bins[kTile];
    for (size_t t = 0; t < row.tiles.size(); ++t) {
        if (!row.reaches(t, floor)) continue;
        weigh(row.tile(t), top, floor, weights, bins);
        for (int64_t i = 0; i < kTile; ++i) mass[bins[i]] += weights[i];
    }
    double total = 0;
    for (const double bin : mass) total += bin;
    const double wanted = static_cast<double>(top_p) * total;
    int32_t crossed = 0;
    double before = 0;
    while (crossed < kBins - 1 && before + mass[crossed] < wanted) before += mass[crossed++];

    auto& inside = row.chosen;
    inside.clear();
    for (size_t t = 0; t < row.tiles.size(); ++t) {
        if (!row.reaches(t, floor)) continue;
        const float* x = row.tile(t);
        weigh(x, top, floor, weights, bins);
        for (int64_t i = 0; i < kTile; ++i) {
            if (bins[i] == crossed && weights[i] > 0) inside.push_back(x[i]);
        }
    }
    return inside.empty() ? top : weighted_select(inside, top, before, wanted);
}

// The smallest float x with x - top >= log(min_p) in float64, the rule of the reference.
float min_p_threshold(float top, float min_p) {
    const double bound = std::log(static_cast<double>(min_p));
    const auto kept = [&](float x) { return static_cast<double>(x) - static_cast<double>(top) >= bound; };
    float x = static_cast<float>(top + bound);
    while (!kept(x)) x = std::nextafter(x, HUGE_VALF);
    for (float lower; x > -FLT_MAX && kept(lower = std::nextafter(x, -HUGE_VALF));) x = lower;
    return x;
}

// Every filter keeps the logits that reach a threshold, so all of them together do.
float filter_threshold(Row& row, int64_t top_k, float top_p, float min_p) {
    float threshold = -HUGE_VALF;
    if (top_k > 0) threshold = kth_largest(row, std::min<int64_t>(top_k, row.x.size()));
    if (top_p < 1) threshold = std::max(threshold, nucleus_threshold(row, threshold, top_p));
    if (min_p > 0) threshold = std::max(threshold, min_p_threshold(static_cast<float>(row.sums.max), min_p));
    return threshold;
}

void keep_from(Row& row, float threshold) {
    row.sums = {};
    for (size_t t = 0; t < row.tiles.size(); ++t) {
        if (row.reaches(t, threshold)) {
            mask_below(row.tile(t), threshold);
            row.tiles[t] = tile_sums(row.tile(t));
        } else {
            row.tiles[t] = {-HUGE_VALF, 0, 0, false};
        }
        row.sums.add(row.tiles[t]);
    }
}

STARS_FAST_CLONES void token_noise(const Draw& draw, uint32_t tile, float* noise) {
    uint32_t words[4][kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
        const Counter block = draw.block(Stream::kToken, tile * kBlocks + i);
        for (int lane = 0; lane < 4; ++lane) words[lane][i] = block[lane];
    }
    float gumbels[4][kBlocks];
    for (int lane = 0; lane < 4; ++lane) {
        for (int i = 0; i < kBlocks; ++i) gumbels[lane][i] = gumbel(words[lane][i]);
    }
    for (int i = 0; i < kTile; ++i) noise[i] = gumbels[i % 4][i / 4];
}

int64_t draw_token(Row& row, const Draw& draw) {
    size_t tile = 0;
    float best = -HUGE_VALF;
    Counter block{};
    for (size_t t = 0; t < row.tiles.size(); ++t) {
        if (t % 4 == 0) block = draw.block(Stream::kTile, static_cast<uint32_t>(t / 4));
        if (row.tiles[t].max == -HUGE_VALF) continue;
        const float score = row.tiles[t].max + std::log(row.tiles[t].sum) + gumbel(block[t % 4]);
        if (score > best) {
            best = score;
            tile = t;
        }
    }
    float noise[kTile];
    token_noise(draw, static_cast<uint32_t>(tile), noise);
    const float* x = row.tile(tile);
    int64_t token = 0;
    best = -HUGE_VALF;
    for (int64_t i = 0; i < kTile; ++i) {
        if (x[i] + noise[i] > best) {
            best = x[i] + noise[i];
            token = i;
        }
    }
    return static_cast<int64_t>(tile) * kTile + token;
}

void fail(const SampleStep& step, int64_t b) {
    step.token[b] = 0;
    step.logprob[b] = step.sampling_logprob[b] = step.entropy[b] = NAN;
    step.alive[b] = false;
}

void sample_row(const SampleStep& step, int64_t b) {
    if (!step.alive[b]) {
        step.token[b] = 0;
        step.logprob[b] = step.sampling_logprob[b] = step.entropy[b] = 0;
        return;
    }
    thread_local Row row;
    row.load(step.logits, step.type, b, step.vocab);
    row.add_up();
    if (!row.sums.valid()) return fail(step, b);
    const RowSums raw = row.sums;

    bool* seen = step.seen == nullptr ? nullptr : step.seen + b * step.vocab;
    const float temperature = step.temperature[b], penalty = step.repetition_penalty[b];
    const bool penalised = seen != nullptr && penalty != 1;
    if (penalised) penalise(row.x.data(), seen, step.vocab, penalty);
    if (temperature != 1) divide(row.x.data(), static_cast<int64_t>(row.x.size()), temperature);
    if (penalised || temperature != 1) row.add_up();
    if (!row.sums.valid()) return fail(step, b);
    const float threshold = filter_threshold(row, step.top_k[b], step.top_p[b], step.min_p[b]);
    if (threshold > -HUGE_VALF) keep_from(row, threshold);

    const Draw draw{static_cast<uint64_t>(step.keys[b]), static_cast<uint32_t>(step.segment[b]),
                    static_cast<uint32_t>(step.attempt[b]), static_cast<uint32_t>(step.position[b])};
    const int64_t token = draw_token(row, draw);
    step.token[b] = token;
    step.logprob[b] = raw.logprob(logit_at(step.logits, step.type, b * step.vocab + token));
    step.sampling_logprob[b] = row.sums.logprob(row.x[token]);
    step.entropy[b] = static_cast<float>(raw.entropy());
    if (seen != nullptr) seen[token] = true;
    const int64_t *eos = step.eos + b * step.eos_count, *eos_end = eos + step.eos_count;
    const bool ended = std::find(eos, eos_end, token) != eos_end;
    const auto next = static_cast<int32_t>(static_cast<uint32_t>(step.position[b]) + 1);  // wraps, as the reference's
    step.position[b] = next;
    step.alive[b] = next < step.limit[b] && !ended;
}

}  // namespace

void check(const SampleStep& step) {
    const int64_t rows = step.rows, element = step.type == Float::k32 ? 4 : 2;
    check_sizes({rows, step.eos_count});
    check_value("the vocabulary of the logits", step.vocab, 1, std::numeric_limits<int32_t>::max());
    check_memory({{"position", step.position, bytes_of({rows, 4})},
                  {"alive", step.alive, rows},
                  {"seen", step.seen, step.seen == nullptr ? 0 : bytes_of({rows, step.vocab})},
                  {"logits", step.logits, bytes_of({rows, step.vocab, element})},
                  {"keys", step.keys, bytes_of({rows, 8})},
                  {"segment", step.segment, bytes_of({rows, 4})},
                  {"attempt", step.attempt, bytes_of({rows, 4})},
                  {"limit", step.limit, bytes_of({rows, 4})},
                  {"temperature", step.temperature, bytes_of({rows, 4})},
                  {"top_k", step.top_k, bytes_of({rows, 4})},
                  {"top_p", step.top_p, bytes_of({rows, 4})},
                  {"min_p", step.min_p, bytes_of({rows, 4})},
                  {"repetition_penalty", step.repetition_penalty, bytes_of({rows, 4})},
                  {"eos", step.eos, bytes_of({rows, step.eos_count, 8})}},
                 3);
}

void sample_step(const SampleStep& step, int threads) {
    check(step);
    parallel_for(step.rows, static_cast<double>(step.rows) * step.vocab, threads,
                 [&](int64_t b) { sample_row(step, b); });
}

void check(const GatherLogprobs& gather) {
    const int64_t vocab = gather.vocab;
    check_sizes({gather.rows, vocab});
    check_memory({{"logits", gather.logits, bytes_of({gather.rows, vocab, gather.type == Float::k32 ? 4 : 2})},
                  {"tokens", gather.tokens, bytes_of({gather.rows, 8})}},
                 0);
    if (!any_outside(gather.tokens, gather.rows, 0, vocab - 1)) return;
    for (int64_t t = 0; t < gather.rows; ++t) {
        if (gather.tokens[t] < 0 || gather.tokens[t] >= vocab) {
            throw std::invalid_argument("tokens[" + std::to_string(t) + "] = " + std::to_string(gather.tokens[t]) +
                                        " is outside the vocabulary of " + std::to_string(vocab));
        }
    }
}

void gather_logprobs(const GatherLogprobs& gather, int threads) {
    check(gather);
    const int64_t vocab = gather.vocab;
    parallel_for(gather.rows, static_cast<double>(gather.rows) * vocab, threads, [&](int64_t t) {
        float tile[kTile];
        RowSums sums;
        for (int64_t first = 0; first < vocab; first += kTile) {
            load_tile(gather.logits, gather.type, t * vocab + first, std::min(kTile, vocab - first), tile);
            sums.add(tile_sums(tile));
        }
        const float logit = logit_at(gather.logits, gather.type, t * vocab + gather.tokens[t]);
        gather.out[t] = sums.valid() ? sums.logprob(logit) : NAN;
    });
}

}  // namespace stars_fast
