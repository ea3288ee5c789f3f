// A decoder's weights, by what they do.
#pragma once

#include "packed_matrix.h"

#include <memory>
#include <vector>

namespace quantlab::engine {

// A matrix and the bias of its rows, which may be empty.
struct Linear {
    std::shared_ptr<const PackedMatrix> weight;
    std::vector<float> bias;
};

struct NormWeights {
    std::vector<float> weight;  // empty where the model has no such norm
    std::vector<float> bias;
};

struct LayerWeights {
    NormWeights attention_norm, query_norm, key_norm, attention_post_norm, inner_norm, inner_post_norm;
    Linear query, key, value, output, gate, up, down;
};

struct DecoderWeights {
    std::shared_ptr<const PackedMatrix> embedding, positions;  // positions: null without a learned table
    std::vector<LayerWeights> layers;
    NormWeights final_norm;
    Linear head;
    std::vector<std::vector<float>> cosines, sines;  // tables, [context][rotated / 2] each
};

}  // namespace quantlab::engine
