// What must hold before a decoder may compute: afterwards no size, index or length is looked at again.
#pragma once

#include "decoder_adapters.h"
#include "decoder_spec.h"
#include "decoder_weights.h"

#include <vector>

namespace quantlab::engine {

inline constexpr int most_decoder_threads = 1024;
inline constexpr int most_decoder_layers = 1 << 16;
inline constexpr int most_branches = 1 << 16;
inline constexpr double most_cache_bytes = 0x1p62;

// Throws std::invalid_argument where spec, weights and arguments disagree or are out of range, naming what, what was
// expected and what was found.
void check_decoder(const DecoderSpec& spec, const DecoderWeights& weights, int context, CacheType cache, int threads);

// The same for adapters of a decoder that has passed.
void check_adapters(const DecoderSpec& spec, const std::vector<LayerAdapters>& adapters);

}  // namespace quantlab::engine
