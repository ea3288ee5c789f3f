// The sampler: the next token from logits, settings, history, seed and position, and from nothing else.
//
// A candidate's weight is a whole number, about 2^40 e^((score - best score) / temperature). Sums of whole numbers are
// exact, so neither the order of adding, nor an instruction set, nor the library's way of selecting can change a draw,
// and no step needs the vocabulary sorted. Candidates below 2^-40 of the best one's probability do not come.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace quantlab::engine {

// In the order in which they act. Whoever makes one has checked it: what a comment asks for holds.
struct SamplerSettings {
    std::vector<std::pair<std::int32_t, double>> logit_bias;  // ids of the vocabulary, each once; below infinity
    double repetition_penalty = 1;                            // above 0, finite
    double presence_penalty = 0;                              // finite
    double frequency_penalty = 0;                             // finite
    std::size_t penalty_window = 0;                           // tokens at the end of the history; 0: all
    double temperature = 1;                                   // 0 takes the best score; finite
    std::size_t top_k = 0;                                    // 0: all
    double top_p = 1;                                         // above 0, at most 1
    double min_p = 0;                                         // 0 to 1
    std::uint64_t seed = 0;
};

// Memory for one draw after the other, kept between them: for one thread at a time.
class Sampler {
public:
    // `vocabulary` from 1 to 2^22, so that the weights' sum fits.
    Sampler(std::size_t vocabulary, SamplerSettings settings);

    std::size_t vocabulary() const { return vocabulary_; }

    // Whether a penalty is on: else the history does not matter.
    bool reads_history() const { return penalizes_; }

    // How many tokens at the end of a history matter; 0: all.
    std::size_t penalty_window() const { return settings_.penalty_window; }

    // The token at `position`. `logits` has one for each id; minus infinity marks tokens that must not come. `history`
    // holds `count` ids of the vocabulary, of which the first `prompt` were not drawn. Among equal scores the smaller
    // id counts as the likelier.
    //
    // Throws std::domain_error for a logit that is NaN or plus infinity, or if no token is left.
    std::int32_t draw(const float* logits, const std::int32_t* history, std::size_t count, std::size_t prompt,
                      std::uint64_t position);

private:
    struct Candidate {
        float score;
        std::int32_t id;
        std::uint64_t weight;
    };
    // Those who take part: all ids where `ids` is null.
    struct Pool {
        const float* scores;
        const std::int32_t* ids;
        std::size_t size;
    };
    struct Place {
        std::int32_t id;
        std::uint64_t through;  // the weights up to and with this one
    };
    static constexpr std::size_t bucket_count = 1024;

    static bool likelier(const Candidate& a, const Candidate& b);
    const float* adjusted(const float* logits, const std::int32_t* history, std::size_t count, std::size_t prompt);
    void penalize(const std::int32_t* history, std::size_t count, std::size_t prompt);
    void survey(const Pool& pool);
    [[noreturn]] void refuse(const Pool& pool) const;
    Pool likeliest(const Pool& pool);
    std::uint64_t weigh(const Pool& pool);
    std::uint64_t kept_weight(const Pool& pool, std::uint64_t above);
    Place place_of(const Pool& pool, std::uint64_t target);
    void gather(const Pool& pool, std::int32_t bucket);

    std::size_t vocabulary_;
    SamplerSettings settings_;
    bool penalizes_;
    float coldness_;               // 1 / temperature
    std::vector<float> adjusted_;  // the scores where bias or penalties change logits
    std::vector<std::uint32_t> counts_;
    std::vector<std::int32_t> seen_;
    std::vector<float> block_best_;  // the best score of each block of the vocabulary
    std::vector<float> bounds_;
    float best_ = 0;
    std::vector<Candidate> candidates_;
    std::vector<float> chosen_scores_;
    std::vector<std::int32_t> chosen_ids_;
    std::array<std::uint64_t, bucket_count> bucket_weight_{};  // candidates by falling score
};

}  // namespace quantlab::engine
