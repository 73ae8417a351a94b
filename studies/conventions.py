"""What do well-known codebases' default KL weights do?

Each codebase's loss with its default weight, pasted into one network with one latent size, batch
size and dataset, beside the calibrated weight.
"""

from functools import partial

from analysis import frames, plots, tables
from analysis.tables import plain
from harness.config import RunConfig
from harness.conventions import LIKELIHOODS, conventions, find
from studies.runner.answers import NEAR
from studies.runner.cli import main
from studies.runner.study import Axis, Source, Study, calibrated
from studies.runner.terminal import counted

AXIS = "convention"

REFERENCES = {"calibrated": "gaussian", "calibrated_laplace": "laplace"}
"""Name -> likelihood of the runs that conventions are compared with."""


def paste(config: RunConfig, name: str, data: Source) -> RunConfig:
    """Set the loss of a codebase, or one as `--loss` of `studies.translate` has it."""
    if name in REFERENCES:
        return calibrated(config.replace(likelihood=REFERENCES[name]), data)
    found = find(
        name,
        shape=(data.channels, 1, data.pixels // data.channels),
        latent_size=config.latent_size,
        batch_size=config.batch_size,
        training_size=data.images,
    )
    return config.replace(
        likelihood=LIKELIHOODS[found.data],
        kl_weight=float(f"{found.beta:.12g}"),  # rounding makes no other convention
        kl_normalization="pixels",
        sigma=found.scale,
        **found.settings,
    )


def prepare(frame: frames.Frame) -> frames.Frame:
    """Add each codebase's own beta, and the nats lost against the calibrated weight.

    The loss is paired by seed, and with the reference of the same likelihood. Binary pixels are
    other data, and their neg_elbo and mse have columns beside those of grey ones.
    """
    own = {name: c.beta for name, c in conventions().items() if c.scale == "fixed"}
    frame = frame.assign(own_beta=frame[AXIS].map(own).astype(float))
    binary = frame["binarization"] != "none"
    for name in ("neg_elbo", "val/neg_elbo", "mse"):
        values = frame.get(name, frame["rate"] * float("nan"))
        frame = frame.assign(**{f"binary/{name}": values.where(binary), name: values.mask(binary)})
    reference = frame["likelihood"].map({of: name for name, of in REFERENCES.items()})
    known = frame.set_index([AXIS, "seed"])["neg_elbo"]
    pairs = zip(reference, frame["seed"], strict=True)
    lost = frame["neg_elbo"] - [known.get(pair, float("nan")) for pair in pairs]
    return frame.assign(nats_lost=lost)


METRICS = (
    *("calibration_ratio", "active_units", "nats_lost", "rate"),
    *("mse", "binary/mse", "binary/neg_elbo"),
)


def what_they_do(frame: frames.Frame) -> str:
    """Return which defaults are near the calibrated weight, which collapse, which cost nats."""
    means = frames.along_axis(frame, AXIS, [*METRICS]).set_index(AXIS)
    theirs = means.drop(index=[*REFERENCES], errors="ignore")
    ratio, size = theirs["calibration_ratio"], frame["latent_size"].max()
    near = theirs[(ratio >= 1 / NEAR) & (ratio <= NEAR)]
    dead = theirs[theirs["active_units"] < 0.5]
    worst = theirs.dropna(subset="nats_lost").sort_values("nats_lost", ascending=False)[:5]
    grey = frame[(frame["likelihood"] == "bernoulli") & (frame["binarization"] == "none")]
    sentences = [
        f"Pasted into this study ({counted(size, 'latent')}, batches of "
        f"{frame['batch_size'].max()}), a formula keeps its reductions, its default weight and its "
        "range of pixels, and its beta is that of this study's images, latents and batches; "
        "own_beta is that of its own.",
        f"Within a factor of {NEAR:g} of the calibrated weight (calibration_ratio 1): "
        f"{', '.join(near.index) or 'none'}.",
        f"No latent is active with: {', '.join(dead.index) or 'none'}.",
    ]
    if len(worst):
        each = ", ".join(f"{name} {_lost(frame, name)}" for name in worst.index)
        seeds = tables.over(frame["seed"].nunique())
        sentences.append(
            "The largest loss against the calibrated weight of the same likelihood, in nats / "
            f"image of test neg_elbo, paired by seed, {seeds}: {each}."
        )
    if len(grey):
        sentences.append(
            "Cross-entropy of grey pixels is no likelihood, so that these have no neg_elbo and are "
            f"not ranked: {', '.join(grey[AXIS].unique())}."
        )
    paragraphs = [text for name in means.index for text in _paragraphs(frame, name)]
    return "\n\n".join([" ".join(sentences), *paragraphs])


def _lost(frame: frames.Frame, name: str) -> str:
    likelihood = frame.loc[frame[AXIS] == name, "likelihood"].iloc[0]
    reference = next((n for n, of in REFERENCES.items() if of == likelihood), "")
    gap = frames.compare(frame, AXIS, name, reference, "neg_elbo")
    alone = f"{gap.mean:.3g}" if gap.seeds else "-"  # of one seed nothing is distinguishable
    return str(gap) if gap.seeds > 1 else alone


def _paragraphs(frame: frames.Frame, name: str) -> list[str]:
    """Return a codebase's paragraph with its notes, and those of others that are the same run.

    Each begins with a name and a colon, by which the report has its anchor.
    """
    runs = frame[frame[AXIS] == name]
    row = runs[[*METRICS, "beta"]].mean()
    found = None if name in REFERENCES else find(name)
    if found is None:
        parts = [f"the calibrated weight, beta {plain(row['beta'])}"]
    elif found.scale != "fixed":
        parts = [found.loss, f"scale {found.scale} here, so that weight 1 is an exact ELBO"]
    else:
        own = f", {plain(found.beta)} at its own shape" if name in conventions() else ""
        parts = [found.loss, f"beta {plain(row['beta'])} here{own}"]
    if (ratio := row["calibration_ratio"]) == ratio:
        parts.append(f"calibration ratio {plain(ratio)}")
    latents = counted(runs["latent_size"].max(), "latent")
    parts.append(f"{row['active_units']:.1f} of {latents} active")
    parts.append(f"rate {row['rate']:.2f} nats")
    parts += [f"{of} {row[of]:.4g}" for of in METRICS if "mse" in of and row[of] == row[of]]
    if (nats := row["binary/neg_elbo"]) == nats:
        parts.append(f"neg_elbo {nats:.2f} nats / image of binary pixels")
    if name not in REFERENCES and (lost := _lost(frame, name)) != "-":
        parts.append(f"nats lost {lost}")
    others = ", ".join(runs.get("equal", runs[AXIS][:0]).dropna().unique())
    texts = {name: "; ".join(parts)}
    texts |= {other: f"the same run as {name}" for other in others.split(", ") if other}
    notes = {n: conventions()[n].notes if n in conventions() else () for n in texts}
    return [f"{n}: {'; '.join([text, *notes[n]])}." for n, text in texts.items()]


STUDY = Study(
    name="conventions",
    question=__doc__,
    base=RunConfig(),
    axis=Axis(AXIS, (*REFERENCES, *conventions()), paste),
    figures={
        "squared_error": (
            partial(plots.conventions, axis=AXIS, likelihood="gaussian"),
            "Squared error: each default on the curve of decoder variance; val/neg_elbo on "
            "validation, all else on test data. Dashed, the exact linear model; dotted, the "
            "calibrated weight.",
        ),
        "absolute_error": (
            partial(plots.conventions, axis=AXIS, likelihood="laplace"),
            "Absolute error: each default against the scale of the Laplace decoder; dotted, the "
            "calibrated one.",
        ),
        "cross_entropy": (
            partial(plots.conventions, axis=AXIS, likelihood="bernoulli"),
            "Cross-entropy: each default against beta. Of grey pixels it is no likelihood, and "
            "there is no neg_elbo; at beta 1 it is an exact one of binary pixels.",
        ),
    },
    answer=what_they_do,
    epochs=lambda data: 25 if data.images < 10_000 else 3,  # 28 points in 2 and 20 minutes
    objective="val/mse",  # the only one of all likelihoods, which ranks nothing
    ranking="val/neg_elbo",
    prepare=prepare,
    merges=True,
    reference="calibrated",
    table=(
        *("own_beta", "beta", "decoder_variance", "val/neg_elbo"),
        *("nats_lost", "mse", "rate", "active_units", "linear/latents_above_variance"),
    ),
)

if __name__ == "__main__":
    main(STUDY)
