"""The stack that a run was trained in on a GPU, recorded so that it can be trained again.

There all runs of a stack are computed as one, and a product of another width may sum in another
order; a run that left early left its stack narrower. On a CPU each is computed alone, and its
company changes no bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import harness
from harness.config import RunConfig, UserError

if TYPE_CHECKING:
    from harness.records import Record
    from harness.tracking import RunLog, Store
    from harness.training.engine import EpochRecord

FILE = "stack.json"


@dataclass
class Companions:
    """The runs of a stack.

    Attributes:
        configs: their settings, in order.
        left: run -> epoch after which it left the stack early.
    """

    configs: list[RunConfig]
    left: dict[int, int]

    @classmethod
    def of(cls, configs: Sequence[RunConfig]) -> Companions:
        """Return a stack that nobody has left yet."""
        return cls(list(configs), {})

    def note(self, record: EpochRecord) -> None:
        """Note who was dropped from a record."""
        self.left |= {record.rows[row]: record.epoch for row in record.dropped}

    def drop(self, record: EpochRecord) -> None:
        """Drop from a record who left after its epoch."""
        rows = enumerate(record.rows)
        record.drop([row for row, run in rows if self.left.get(run) == record.epoch])

    def log(self, log: RunLog, own: int, device: str) -> None:
        """Log the stack with one of its runs, where it matters."""
        if device != "cpu":
            log.text(self.to_json(own), FILE)

    def to_json(self, own: int) -> str:
        """Write the stack as one of its runs records it."""
        configs = [asdict(config) for config in self.configs]
        return json.dumps({"own": own, "left": self.left, "configs": configs})


def read(store: Store, record: Record, device: str) -> tuple[Companions, int]:
    """Read whom a run is to be trained with on a device, and its place among them.

    Raises:
        UserError: the run has no record of its stack, or a broken one.
    """
    if "cpu" in (device, record.made_with["device"]["kind"]):
        return Companions.of([record.config]), 0
    values = harness.records.read_json(store, record.run_id, FILE)
    try:
        return from_json(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{FILE} of run {record.run_id} is broken ({error!r}); it cannot be repeated"
        ) from None


def from_json(values: Mapping[str, Any]) -> tuple[Companions, int]:
    """Read what `Companions.to_json` wrote."""
    configs = [RunConfig.from_json(json.dumps(config)) for config in values["configs"]]
    return Companions(configs, {int(run): at for run, at in values["left"].items()}), values["own"]
