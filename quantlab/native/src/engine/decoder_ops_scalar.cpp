// The specification of the decoder's operations.
#include "decoder_ops_template.h"

namespace quantlab::engine {

const DecoderOps& scalar_decoder_ops() {
    static constexpr DecoderOps ops = DecoderOpsOver<ScalarLanes>::ops();
    return ops;
}

}  // namespace quantlab::engine
