// The decoder's operations, compiled for avx512: nothing outside its table may be instantiated here.
#include "decoder_ops.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "decoder_ops_template.h"

namespace quantlab::engine {

const DecoderOps* avx512_decoder_ops() {
    static constexpr DecoderOps ops = DecoderOpsOver<Avx512Lanes>::ops();
    return &ops;
}

}  // namespace quantlab::engine

#else

namespace quantlab::engine {

const DecoderOps* avx512_decoder_ops() { return nullptr; }

}  // namespace quantlab::engine

#endif
