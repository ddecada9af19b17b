"""The one exception type that a command line turns into a single line for its user."""


class UserError(Exception):
    """A mistake the user can mend: its message says what is wrong, where, and what would fit, on one line."""
