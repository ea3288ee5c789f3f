"""The command line: commands parse, call one library function, and print."""

from __future__ import annotations

import errno
import os
import sys

from quantlab.cli.signals import heed_signals

# What the system says of a path that the user gave, where no reader or writer said more.
_WRONG_PATH = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)


def main() -> None:
    """Run the command line; exits with 0 done, 2 wrong request or input, 130 interrupted, 1 anything else."""
    heed_signals()
    sys.exit(_run())


def _run() -> int:
    """The exit status; every failure is one line on stderr."""
    from quantlab.errors import InputError

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("LANCEDB_LOG", "error")  # its warnings are for those who program it
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
        if error.errno in _WRONG_PATH and isinstance(error.filename, str | bytes):
            return _fail(f"{os.fsdecode(error.filename)}: {error.strerror}; choose another name", 2)
        if error.errno in (errno.EFBIG, errno.EDQUOT):
            return _fail(f"cannot write so much: {error.strerror}; nothing was left half-written", 1)
        if error.errno == errno.ENOENT and error.filename is None:  # of getcwd
            return _fail("the current folder is not there any more; change to another one", 2)
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
