"""Which KL weight does a loss really have?

Of a well-known codebase by its name, or of any loss as
`--loss "mse:mean + 0.00025*kl:sum" --shape 3 64 64 --latent-size 128`. Without either, all names.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated

import tyro

from harness.config import RunConfig, UserError
from harness.conventions import Convention, Translation, conventions, find, translate
from studies.runner.cli import clear_errors, read
from studies.runner.terminal import counted

JSON = ("beta", "decoder_variance", "laplace_scale", "equal_weights", "warnings")
LISTED = ("name", "loss", "beta", "scale", "source")  # with --json, of each in the list


@dataclass(frozen=True)
class TranslateOptions:
    """Options of a translation; what is not given has the codebase's default.

    Attributes:
        name: of a codebase.
        loss: [factor*]DATA:REDUCTION + weight*kl:REDUCTION; DATA is mse, l1 or bce, a reduction
            mean (over values and images), sum (over values, mean over images) or total (over both).
        weight: the KL weight.
        shape: of an image, channels first.
        latent_size: number of latents.
        batch_size: images of a step.
        training_size: images of the training set.
        pixels: lowest and highest value of the pixels.
        json: print one JSON object, and all else on standard error.
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    loss: str | None = None
    weight: float | None = None
    shape: tuple[int, ...] | None = None
    latent_size: int | None = None
    batch_size: int | None = None
    training_size: int | None = None
    pixels: tuple[float, float] | None = None
    json: bool = False


def main(args: Sequence[str] | None = None) -> None:
    """Translate a loss from the command line; exit code 0, or 2 for bad input."""
    with clear_errors(args) as terminal:
        options = read(TranslateOptions, "translate", __doc__ or "", args)
        given = {f.name: getattr(options, f.name) for f in fields(options)[2:-1]}
        name = options.name or options.loss
        if options.name and options.loss:
            raise UserError(f"--loss beside {options.name!r}: give one of the two")
        if name is None:
            every = conventions().values()
            of_each = [{key: getattr(one, key) for key in LISTED} for one in every]
            terminal.document["conventions"] = of_each
            for convention in () if options.json else every:
                terminal.line(row(convention))
            return
        found = translate(name, **given)
        terminal.document |= {key: asdict(found)[key] for key in JSON}
        if not options.json:
            terminal.line(text(found, find(name, **given)))


def row(convention: Convention) -> str:
    """Return a line of the list of all conventions."""
    fixed = convention.scale == "fixed"
    beta = f"beta {convention.beta:.3g}" if fixed else f"scale {convention.scale}"
    return f"{convention.name:30}{convention.loss:33}{beta}"


def text(found: Translation, convention: Convention) -> str:
    """Return a translation as lines of at most 80 columns, but for what is to be pasted."""
    shape = " x ".join(map(str, convention.shape))
    low, high = convention.pixels
    latents = counted(convention.latent_size, "latent")
    of = f"images {shape}, {latents}, batches of {convention.batch_size}"
    named = "" if ":" in convention.name else f"{convention.name}: "
    read_in = f"read in {convention.source}" if convention.source else ""
    lines = [f"{named}{convention.loss}", f"  {of}, pixels from {low:g} to {high:g}"]
    lines += [*(f"  {line}" for line in textwrap.wrap(read_in, 76)), ""]
    error = {"mse": "squared error", "l1": "absolute error", "bce": "cross-entropy"}
    rows = {
        "beta": (found.beta, f"weight of the KL beside the summed {error[convention.data]}"),
        "decoder_variance": (found.decoder_variance, "beta / 2, pixel^2"),
        "laplace_scale": (found.laplace_scale, "beta, in pixels"),
        "standard deviation": (found.grey_levels, "of that decoder, in grey levels of 255"),
    }
    if found.beta is None:
        how = {"optimal": "fitted", "learned": "trained"}[convention.scale]
        rows["beta"] = 1, f"beside -ln p(x|z), whose scale is {how}"
    for name, (value, what) in rows.items():
        if value is not None:
            lines.append(f"{name:20}{value:<11.4g}{what}")
    lines += ["", "kl_weight of the same beta by kl_normalization:"]
    lines.append("  " + "   ".join(f"{name} {w:.4g}" for name, w in found.equal_weights.items()))
    lines += ["", pasted(found.config), *([""] if found.warnings else [])]
    for warning in found.warnings:
        lines += textwrap.wrap(f"- {warning}", 80, subsequent_indent="  ")
    return "\n".join(lines)


def pasted(config: RunConfig) -> str:
    """Return the call that makes a configuration, without the settings that have their defaults."""
    defaults = vars(RunConfig())
    given = [f"{k}={v!r}" for k, v in vars(config).items() if v != defaults[k]]
    return f"RunConfig({', '.join(given)})"


if __name__ == "__main__":
    main()
