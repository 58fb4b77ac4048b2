"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: a config, an argument, a file, an annotation.

    The message says which one, what is wrong and what to do. Command lines show it as one line
    without a traceback; library code sees an ordinary ``ValueError``.
    """


def check_choice(name: str, value: object, choices) -> None:
    """Raise :class:`UserError` if ``value`` is none of ``choices``. ``name`` says what it is."""
    if value not in choices:
        raise UserError(f"unknown {name} {value!r}; choose one of: {', '.join(choices)}")
