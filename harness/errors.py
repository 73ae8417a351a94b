"""Errors for users."""


class UserError(ValueError):
    """An input that cannot be used; the message names it and gives allowed values or a remedy.

    Command lines print the message alone and exit with code 2.
    """

    def _render_traceback_(self) -> list[str]:  # IPython's hook: the message alone in a notebook
        return [f"error: {self}"]


class SummaryError(UserError):
    """A figure, an answer or a metric that failed after its runs were trained; exit code 3."""
