// The specification's results.
#include "lanes_results.h"

Bits scalar_results(const LaneInputs& inputs) {
    return LaneResults<quantlab::engine::ScalarLanes>::of(inputs);
}
