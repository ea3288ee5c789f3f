"""The command line: commands parse, call one library function, and print."""

from __future__ import annotations

import errno
import os
import signal
import sys


def main() -> None:
    """Run the command line; exits with 0 done, 2 wrong request or input, 130 interrupted, 1 anything else."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run())


def _terminate(signal_number: int, frame: object) -> None:
    raise SystemExit(128 + signal_number)  # unwinds, so that temporary folders go


def _run() -> int:
    """The exit status; every failure is one line on stderr."""
    from quantlab.errors import InputError

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from quantlab.cli.app import run

        status = run()
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that has gone is noticed here, not at the interpreter's end
        return status
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", 130)
    except BrokenPipeError:  # the reader of our output has gone: `quantlab ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail("the disk is full; nothing was left half-written", 1)
        return _unexpected(error)
    except Exception as error:
        return _unexpected(error)


def _fail(message: str, status: int) -> int:
    from quantlab.errors import one_line

    print(f"quantlab: {one_line(' '.join(message.splitlines()))}", file=sys.stderr)
    return status


def _unexpected(error: Exception) -> int:
    if os.environ.get("QUANTLAB_TRACEBACK"):
        raise error
    kind = type(error).__name__
    return _fail(f"unexpected {kind}: {error} (QUANTLAB_TRACEBACK=1 shows where; please report it)", 1)
