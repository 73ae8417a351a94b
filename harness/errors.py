"""Errors that a user reads."""


class UserError(ValueError):
    """An input that cannot be used; the message names it, what is allowed and what to do.

    Command lines print the message alone and exit with code 2.
    """

    def _render_traceback_(self) -> list[str]:
        """Show the message alone in a notebook too (IPython's hook)."""
        return [f"error: {self}"]


class SummaryError(UserError):
    """A figure, an answer or a metric that failed although its runs are trained: exit code 3."""
