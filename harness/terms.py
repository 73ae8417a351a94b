"""Loss terms that are built in, each a function of a batch that a user could write."""

from __future__ import annotations

from harness import registry

registry.TERMS.update()
