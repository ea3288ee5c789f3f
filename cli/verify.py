"""`quantlab verify PATH [--source MODEL]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from quantlab.cli.console import human_bytes, print_json, progress
from quantlab.cli.options import Config, Json, Model

from quantlab.errors import InputError

if TYPE_CHECKING:
    from quantlab.calibration.verify import Fault


def verify(
    path: Model,
    source: Annotated[
        str | None,
        typer.Option(
            "--source", help="The model it was quantized from: every block is derived again.", show_default=False
        ),
    ] = None,
    config: Config = None,
    json: Json = False,
) -> None:
    """Check a model: structure, numbers, checksums, and against its source. Exit status 2 if there is a fault."""
    from quantlab.calibration.verify import verify_checkpoint

    with progress("verifying", "bytes") as report:
        result = verify_checkpoint(path, source, progress=report)
    if json:
        print_json(result)
    else:
        for fault in result.faults:
            print(_told(fault))
        checks = f"{human_bytes(result.bytes)}; checked: {', '.join(result.checks)}"
        print(f"{'sound' if result.ok else 'damaged'}: {result.tensors} tensors, {checks}")
    if not result.ok:
        raise InputError(f"{path}: {len(result.faults)} fault(s) found, the first: {_told(result.faults[0])}")


def _told(fault: Fault) -> str:
    where = [fault.tensor] if fault.tensor else []
    where += [f"block {fault.block}"] if fault.block is not None else []
    return ": ".join([", ".join(where), fault.problem]) if where else fault.problem
