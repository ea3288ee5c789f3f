"""What ends a training that was set up well."""


class TrainingFailedError(RuntimeError):
    """The loss is no number any more, or memory ran out: one line that says where, what is left, and what to change."""
