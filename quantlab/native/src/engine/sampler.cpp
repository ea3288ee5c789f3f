#include "sampler.h"

#include "random_number.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>

namespace quantlab::engine {

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float largest = std::numeric_limits<float>::max();

// Scores are read in blocks of a fixed size, the last one filled up with minus infinity: compilers turn the loops over
// a block into vector instructions. All that they do is single roundings, the same ones in a vector.
constexpr std::size_t block = 64;

std::size_t blocks_of(std::size_t size) { return (size + block - 1) / block; }

class BlockReader {
public:
    BlockReader(const float* scores, std::size_t size) : scores_(scores), size_(size) {}

    const float* read(std::size_t index) {
        const std::size_t first = index * block;
        if (first + block <= size_) return scores_ + first;
        std::fill(std::copy(scores_ + first, scores_ + size_, last_), last_ + block, -infinity);
        return last_;
    }

private:
    const float* scores_;
    std::size_t size_;
    float last_[block];
};

// Negative if one is NaN: its bits without the sign are those of a number above infinity's.
inline std::int32_t nan_mark(const float* scores) {
    std::int32_t mark = 0;
    for (std::size_t i = 0; i < block; ++i) {
        mark |= 0x7f800000 - (std::bit_cast<std::int32_t>(scores[i]) & 0x7fffffff);
    }
    return mark;
}

inline float best_of(const float* scores) {
    constexpr std::size_t lanes = 8;
    float best[lanes];
    std::copy(scores, scores + lanes, best);
    for (std::size_t i = lanes; i < block; i += lanes) {
        for (std::size_t l = 0; l < lanes; ++l) {
            best[l] = scores[i + l] > best[l] ? scores[i + l] : best[l];
        }
    }
    return *std::max_element(best, best + lanes);
}

// How far a score is below the best one, in temperatures; at `deepest`, where weights are 0, and below it `deepest`.
constexpr float deepest = 30.0f;

inline float depth_of(float score, float best, float coldness) {
    const float depth = (best - score) * coldness;
    return depth < deepest ? depth : deepest;
}

// For a whole block, in a loop of its own: beside what follows, compilers would branch at `deepest`.
inline void depths_of(const float* scores, float best, float coldness, float* depths) {
    for (std::size_t i = 0; i < block; ++i) {
        depths[i] = depth_of(scores[i], best, coldness);
    }
}

inline std::int32_t bucket_of(float depth, std::size_t buckets) {
    return static_cast<std::int32_t>(depth * (static_cast<float>(buckets - 1) / deepest));
}

inline void buckets_of(const float* depths, std::size_t buckets, std::int32_t* out) {
    for (std::size_t i = 0; i < block; ++i) {
        out[i] = bucket_of(depths[i], buckets);
    }
}

// 2^40 e^-depth, for depths from 0 to `deepest`, to about 2 ulp.
//
// depth = n ln 2 - r with |r| <= ln 2 / 2, n by adding a number whose ulp is 1, ln 2 in two parts so that the first
// product is exact; e^r by its Taylor polynomial. Without fused multiply-adds, which not every processor has.
inline float weight_of(float depth) {
    constexpr float rounder = 12582912.0f;  // 1.5 * 2^23
    const float shifted = depth * 1.44269504088896341f + rounder;
    const float n = shifted - rounder;
    const float r = (n * 0.693145751953125f - depth) + n * 1.42860682030941723e-6f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const std::int32_t steps = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(rounder);
    return p * std::bit_cast<float>((127 + 40 - steps) << 23);
}

// By way of a signed number, which processors convert to in one instruction.
inline std::uint64_t whole_weight(float weight) {
    return static_cast<std::uint64_t>(static_cast<std::int64_t>(weight));
}

constexpr double whole = 0x1p40;  // the weight of the best score

std::uint64_t rounded_up(double weight) { return static_cast<std::uint64_t>(std::ceil(weight)); }

double bounded(double value) { return std::clamp(value, -static_cast<double>(largest), static_cast<double>(largest)); }

// A finite score stays finite. Others stay as they are: minus infinity is meant, the rest will be refused.
template <typename Change>
void adjust(float& score, const Change& change) {
    if (std::isfinite(score)) {
        score = static_cast<float>(bounded(change(static_cast<double>(score))));
    }
}

float coldness_of(double temperature) {
    // Normal numbers: infinity times zero, and subnormals that a processor may be told to take for zero, stay away.
    const double coldness = 1.0 / std::max(temperature, std::numeric_limits<double>::min());
    const double least = std::numeric_limits<float>::min();
    return static_cast<float>(std::clamp(coldness, least, static_cast<double>(largest)));
}

}  // namespace

Sampler::Sampler(std::size_t vocabulary, SamplerSettings settings)
    : vocabulary_(vocabulary),
      settings_(std::move(settings)),
      penalizes_(settings_.repetition_penalty != 1 || settings_.presence_penalty != 0 ||
                 settings_.frequency_penalty != 0),
      coldness_(coldness_of(settings_.temperature)),
      adjusted_(penalizes_ || !settings_.logit_bias.empty() ? vocabulary : 0),
      counts_(penalizes_ ? vocabulary : 0),
      block_best_(blocks_of(vocabulary)) {}

std::int32_t Sampler::draw(const float* logits, const std::int32_t* history, std::size_t count, std::size_t prompt,
                           std::uint64_t position) {
    Pool pool{adjusted_.empty() ? logits : adjusted(logits, history, count, prompt), nullptr, vocabulary_};
    survey(pool);
    if (settings_.temperature == 0) {
        const auto at = static_cast<std::size_t>(std::max_element(block_best_.begin(), block_best_.end()) -
                                                 block_best_.begin()) * block;
        return static_cast<std::int32_t>(std::find(pool.scores + at, pool.scores + pool.size, best_) - pool.scores);
    }
    if (settings_.top_k > 0 && settings_.top_k < pool.size) {
        pool = likeliest(pool);
    }
    const std::uint64_t kept = kept_weight(pool, weigh(pool));
    return place_of(pool, multiply_high(random_word(settings_.seed, position), kept)).id;
}

bool Sampler::likelier(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

const float* Sampler::adjusted(const float* logits, const std::int32_t* history, std::size_t count,
                               std::size_t prompt) {
    std::copy(logits, logits + vocabulary_, adjusted_.begin());
    for (const auto& [id, bias] : settings_.logit_bias) {
        float& score = adjusted_[static_cast<std::size_t>(id)];
        if (bias == -std::numeric_limits<double>::infinity()) {
            score = -infinity;
        } else {
            adjust(score, [bias = bias](double value) { return value + bias; });
        }
    }
    if (penalizes_) {
        penalize(history, count, prompt);
    }
    return adjusted_.data();
}

void Sampler::penalize(const std::int32_t* history, std::size_t count, std::size_t prompt) {
    const std::size_t window = settings_.penalty_window;
    for (std::size_t i = window > 0 && window < count ? count - window : 0; i < count; ++i) {
        std::uint32_t& times = counts_[static_cast<std::size_t>(history[i])];  // drawn, and 1 for being seen at all
        if (times == 0) {
            seen_.push_back(history[i]);
            times = 1;
        }
        times += i >= prompt ? 1 : 0;
    }
    for (const std::int32_t id : seen_) {
        const auto at = static_cast<std::size_t>(id);
        const std::uint32_t drawn = counts_[at] - 1;
        adjust(adjusted_[at], [&](double score) {
            const double factor = settings_.repetition_penalty;
            const double divided = bounded(score > 0 ? score / factor : score * factor);
            return divided - settings_.frequency_penalty * drawn - (drawn > 0 ? settings_.presence_penalty : 0.0);
        });
        counts_[at] = 0;
    }
    seen_.clear();
}

// Finds the best score of each block and of all, and refuses what cannot be a score.
void Sampler::survey(const Pool& pool) {
    BlockReader reader(pool.scores, pool.size);
    std::int32_t mark = 0;
    best_ = -infinity;
    for (std::size_t b = 0; b < blocks_of(pool.size); ++b) {
        const float* scores = reader.read(b);
        mark |= nan_mark(scores);
        block_best_[b] = best_of(scores);
        best_ = block_best_[b] > best_ ? block_best_[b] : best_;
    }
    if (mark < 0 || best_ == infinity || best_ == -infinity) {
        refuse(pool);
    }
}

void Sampler::refuse(const Pool& pool) const {
    for (std::size_t i = 0; i < pool.size; ++i) {
        if (std::isnan(pool.scores[i]) || pool.scores[i] == infinity) {
            throw std::domain_error("the logit of token " + std::to_string(i) + " is " +
                                    (pool.scores[i] == infinity ? "infinite" : "NaN"));
        }
    }
    throw std::domain_error("every token's logit is minus infinity");
}

// The `top_k` first in falling order, in any order.
//
// As many blocks' best scores as are wanted, or else all scores, bound them from below: few scores reach the bound, and
// only they are moved.
Sampler::Pool Sampler::likeliest(const Pool& pool) {
    const std::size_t wanted = settings_.top_k;
    if (block_best_.size() >= wanted) {
        bounds_ = block_best_;
    } else {
        bounds_.assign(pool.scores, pool.scores + pool.size);
    }
    const auto last = bounds_.begin() + static_cast<std::ptrdiff_t>(wanted - 1);
    std::nth_element(bounds_.begin(), last, bounds_.end(), std::greater<>());
    const float bound = *last;
    candidates_.clear();
    for (std::size_t b = 0; b < block_best_.size(); ++b) {
        if (block_best_[b] < bound) continue;
        for (std::size_t i = b * block; i < std::min(pool.size, (b + 1) * block); ++i) {
            if (pool.scores[i] >= bound) {
                candidates_.push_back({pool.scores[i], static_cast<std::int32_t>(i), 0});
            }
        }
    }
    if (candidates_.size() > wanted) {
        std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(wanted - 1),
                         candidates_.end(), likelier);
    }
    chosen_scores_.clear();
    chosen_ids_.clear();
    for (std::size_t i = 0; i < wanted; ++i) {
        chosen_scores_.push_back(candidates_[i].score);
        chosen_ids_.push_back(candidates_[i].id);
    }
    return {chosen_scores_.data(), chosen_ids_.data(), wanted};
}

// Fills the buckets; the weight of those whom min-p keeps.
std::uint64_t Sampler::weigh(const Pool& pool) {
    bucket_weight_.fill(0);
    const std::uint64_t least = rounded_up(settings_.min_p * whole);
    std::uint64_t above = 0;
    BlockReader reader(pool.scores, pool.size);
    for (std::size_t b = 0; b < blocks_of(pool.size); ++b) {
        if (pool.ids == nullptr && depth_of(block_best_[b], best_, coldness_) == deepest) continue;
        const float* scores = reader.read(b);
        float depths[block], weights[block];
        std::int32_t buckets[block];
        depths_of(scores, best_, coldness_, depths);
        buckets_of(depths, bucket_count, buckets);
        for (std::size_t i = 0; i < block; ++i) {
            weights[i] = weight_of(depths[i]);
        }
        for (std::size_t i = 0; i < block; ++i) {
            const std::uint64_t weight = whole_weight(weights[i]);
            bucket_weight_[static_cast<std::size_t>(buckets[i])] += weight;
            above += weight >= least ? weight : 0;
        }
    }
    return above;
}

// The weight of those whom both top-p and min-p keep: two beginnings of the falling order, of which the shorter counts.
std::uint64_t Sampler::kept_weight(const Pool& pool, std::uint64_t above) {
    if (settings_.top_p == 1) return above;
    std::uint64_t total = 0;
    for (const std::uint64_t weight : bucket_weight_) {
        total += weight;
    }
    const std::uint64_t share = std::min(total, rounded_up(settings_.top_p * static_cast<double>(total)));
    return std::min(above, place_of(pool, share - 1).through);
}

// The first in falling order with whom the weights exceed `target`, which is below their sum.
Sampler::Place Sampler::place_of(const Pool& pool, std::uint64_t target) {
    std::uint64_t before = 0;
    std::size_t bucket = 0;
    while (before + bucket_weight_[bucket] <= target) {
        before += bucket_weight_[bucket++];
    }
    gather(pool, static_cast<std::int32_t>(bucket));
    auto first = candidates_.begin(), last = candidates_.end();
    while (last - first > 1) {
        const auto middle = first + (last - first) / 2;
        std::nth_element(first, middle, last, likelier);
        std::uint64_t half = 0;
        for (auto candidate = first; candidate != middle; ++candidate) {
            half += candidate->weight;
        }
        if (before + half > target) {
            last = middle;
        } else {
            before += half;
            first = middle;
        }
    }
    return {first->id, before + first->weight};
}

void Sampler::gather(const Pool& pool, std::int32_t bucket) {
    candidates_.clear();
    BlockReader reader(pool.scores, pool.size);
    for (std::size_t b = 0; b < blocks_of(pool.size); ++b) {
        if (pool.ids == nullptr && bucket_of(depth_of(block_best_[b], best_, coldness_), bucket_count) > bucket) {
            continue;
        }
        float depths[block];
        std::int32_t buckets[block];
        depths_of(reader.read(b), best_, coldness_, depths);
        buckets_of(depths, bucket_count, buckets);
        for (std::size_t i = 0; i < std::min(block, pool.size - b * block); ++i) {
            if (buckets[i] != bucket) continue;
            const std::size_t at = b * block + i;
            const std::int32_t id = pool.ids == nullptr ? static_cast<std::int32_t>(at) : pool.ids[at];
            candidates_.push_back({pool.scores[at], id, whole_weight(weight_of(depths[i]))});
        }
    }
}

}  // namespace quantlab::engine
