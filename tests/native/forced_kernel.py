"""Kernels by name, for tests that compare instruction sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from quantlab import native
from quantlab.errors import InputError


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Within it, `name` is the kernel that the native core chooses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTLAB_CPU_KERNEL", name)
        yield


def can_run(name: str) -> bool:
    """Whether this processor has it."""
    with kernel(name):
        try:
            return native.cpu_kernel() == name
        except InputError:
            return False
