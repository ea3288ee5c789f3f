// Compiled for AVX2, FMA and F16C.
#include "lanes_results.h"

#if defined(__AVX2__)
Bits avx2_results(const LaneInputs& inputs) { return LaneResults<quantlab::engine::Avx2Lanes>::of(inputs); }
#else
Bits avx2_results(const LaneInputs&) { return {}; }
#endif
