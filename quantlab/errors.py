"""The one exception for a request or an input that is wrong: a single line that says what, where and how to mend it."""


class InputError(ValueError):
    """A request or an input file is wrong.

    The message is one line naming the file or tensor, the fault and the way out. Commands print it and exit with
    status 2; everything else that escapes a library function is a defect or the machine's fault (status 1).
    """


def missing_extra(package: str, extra: str) -> InputError:
    """The error for an optional dependency that is not installed, with the one line that installs it."""
    return InputError(f"{package} is not installed; install it with: pip install 'quantlab[{extra}]'")
