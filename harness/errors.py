"""Errors for users."""


class UserError(ValueError):
    """An input that cannot be used; command lines print the message alone, with exit code 2."""

    def _render_traceback_(self) -> list[str]:  # IPython's hook: the message alone in a notebook
        return [f"error: {self}"]


class SummaryError(UserError):
    """A figure, an answer or a metric that failed after its runs were trained; exit code 3."""
