"""Random numbers that depend on nothing but a seed, a tensor's name, a model's place and an element's place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

PartNoise = Callable[[int, int, int], torch.Tensor]  # (model index, first, last element of the part) -> [last - first]

PER_COUNT = 8  # numbers that one step of Philox's counter gives: four words of 64 bits, two numbers in each
BITS = 24  # of each number: all that an fp32 in [0, 1) of even spacing holds


@dataclass(frozen=True)
class Noise:
    """Uniform numbers for the elements of one tensor, the same however the tensor is cut and in whatever order.

    The generator is Philox4x64-10 (Salmon et al. 2011), whose output is a function of key and counter: the key is a
    hash of (seed, tensor name, model index), the counter an eighth of the element's index in the flattened tensor.
    """

    seed: int
    tensor_name: str

    def uniform(self, model: int, count: int, offset: int = 0) -> torch.Tensor:
        """fp32 multiples of 2^-24 in [0, 1), of the `count` elements from index `offset` on."""
        first, skipped = divmod(offset, PER_COUNT)
        last = -(-(offset + count) // PER_COUNT)
        words = np.random.Philox(key=self._key(model), counter=first).random_raw(4 * (last - first))
        numbers = words.view(np.uint32)[skipped : skipped + count] >> np.uint32(32 - BITS)
        return torch.from_numpy(numbers.view(np.int32)).float().mul_(2.0**-BITS)

    def part(self, offset: int) -> PartNoise:
        """The same for the elements of a part that begins at index `offset`, by their places in the part."""
        return lambda model, first, last: self.uniform(model, last - first, offset + first)

    def _key(self, model: int) -> int:
        text = json.dumps([self.seed, self.tensor_name, model])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
