// Compiled for AVX-512 F, BW, VL and VNNI.
#include "lanes_results.h"

#if defined(__AVX512VNNI__)
Bits avx512_results(const LaneInputs& inputs) { return LaneResults<quantlab::engine::Avx512Lanes>::of(inputs); }
#else
Bits avx512_results(const LaneInputs&) { return {}; }
#endif
