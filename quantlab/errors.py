"""The one exception for a request or an input that is wrong: a single line that says what, where and how to mend it."""

MOST_CHARACTERS = 2000  # of a message; PATH_MAX is 4096, and a damaged file may name a tensor with megabytes


class InputError(ValueError):
    """A request or an input file is wrong.

    The message is one line naming the file or tensor, the fault and the way out. Commands print it and exit with
    status 2; everything else that escapes a library function is a defect or the machine's fault (status 1).
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str, most: int = MOST_CHARACTERS) -> str:
    """`text` as a terminal can show it, whatever a hostile file put in: what does not print (line breaks, control
    codes, marks of writing direction, halves of surrogate pairs) becomes an escape, and a text of more than `most`
    characters loses its middle.
    """
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def missing_extra(package: str, extra: str) -> InputError:
    """The error for an optional dependency that is not installed, with the one line that installs it."""
    return InputError(f"{package} is not installed; install it with: pip install 'quantlab[{extra}]'")
