// The decoder's operations, compiled for avx2: nothing outside its table may be instantiated here.
#include "decoder_ops.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "decoder_ops_template.h"

namespace quantlab::engine {

const DecoderOps* avx2_decoder_ops() {
    static constexpr DecoderOps ops = DecoderOpsOver<Avx2Lanes>::ops();
    return &ops;
}

}  // namespace quantlab::engine

#else

namespace quantlab::engine {

const DecoderOps* avx2_decoder_ops() { return nullptr; }

}  // namespace quantlab::engine

#endif
