"""What a plan has to know of a dataset before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.config import UserError

if TYPE_CHECKING:
    from harness.data.dataset import Dataset

FEW_IMAGES = 10_000
"""Own images below this number are passed over as often as digits are, others as often as MNIST."""


@dataclass(frozen=True)
class Source:
    """What is known of a dataset.

    Attributes:
        name: the dataset's.
        pixels: D.
        calibrated: a KL weight near calibration_ratio = 1 with 10 latents and mode "pixels".
        epochs: passes over the training split where the user names no number.
        digest: of own images, which a name does not identify; "" for the datasets that it does.
        images: their number in train, val and test.
        words: options that name it on a command line; of own images without the folder's place.
    """

    name: str
    pixels: int
    calibrated: float
    epochs: int
    digest: str = ""
    images: tuple[int, ...] = ()
    words: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two datasets the same, as a study's settings have it."""
        own = {"dataset_digest": self.digest, "dataset_images": list(self.images)}
        return {"dataset": self.name} | (own if self.digest else {})


KNOWN = {
    name: Source(name, pixels, calibrated, epochs, words=f"--dataset {name}")
    for name, pixels, calibrated, epochs in (
        ("digits", 64, 0.02, 50),
        ("mnist", 784, 0.05, 20),
        ("fashion_mnist", 784, 0.03, 20),
        ("kmnist", 784, 0.1, 20),
    )
}
"""Weights of digits and mnist are measured by `python -m studies.kl_weight`, the others guessed
from their variance."""


def read_own(name: str, image_size: Sequence[int] | None) -> Dataset | None:
    """Read the user's own images, which a plan depends on; None for any other dataset.

    Raises:
        UserError: they cannot be read, or an option is for own images alone.
    """
    if not name.startswith("folder:"):
        if image_size is not None:
            raise UserError("--image-size: only images of --dataset folder:PATH are resized")
        return None
    import harness

    return harness.load_dataset(name, image_size=image_size)


def source(name: str, own: Dataset | None) -> Source:
    """Return what is known of a dataset.

    The calibrated weight of own images is guessed: half the variance of a pixel. With 10 latents
    the best weight is 0.3 times the variance on digits and 0.7 times on MNIST.

    Args:
        name: as the user gave it.
        own: the user's own images.

    Raises:
        UserError: there is no dataset of that name.
    """
    if own is None:
        if name not in KNOWN:
            raise UserError(f"dataset={name!r}: choose one of {', '.join(KNOWN)}, or folder:PATH")
        return KNOWN[name]
    _, height, width = own.image_shape
    folder = own.name.removeprefix("folder-")
    words = f"--dataset folder:{folder} --image-size {height} {width}"
    epochs = KNOWN["digits" if len(own.train) < FEW_IMAGES else "mnist"].epochs
    images = (len(own.train), len(own.val), len(own.test))
    return Source(own.name, own.pixels, own.pixel_variance / 2, epochs, own.digest, images, words)
