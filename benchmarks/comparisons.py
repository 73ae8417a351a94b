"""How often a study calls an equal value worse, and what its number of seeds can show.

`python -m benchmarks.comparisons` judges simulated studies by the critical values of
`analysis.comparisons`. All values of a study are equal; their spreads over seeds are equal, those
of README's study of the KL weight, or equal but for one that is a thousand times smaller; half of
the variance is shared by the values of a seed; or luck is exponential, far from normal. Columns:

- under each kind of spread: studies that call some value worse than the best, at most 5 %;
- covered: studies in which the true mean of the best value lies in its interval, at least 95 %: the
  least of all normal kinds, and that of exponential luck;
- seen: the true difference, in standard deviations between seeds, that is called worse in 80 % of
  studies, if one value is the best by that much and spreads are equal.

The last lines are README's study with the means and spreads that it found as true ones.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from scipy import special

from analysis.comparisons import critical, selection_bias
from benchmarks import machine

DESIGNS = ((14, 3), (14, 5), (6, 5), (14, 2), (14, 10), (40, 3))
MEANS = np.array(
    [123.14, -1.62, -14.17, -21.47, -26.67, -27.69, -27.42, -23.15, -16.38, -6.94, 5.74]
    + [7.08, 7.07, 7.08]
)
"""Validation `neg_elbo` of README's study, weights 0 to 10; weight 1 is the eleventh."""
HALVES = np.array(
    [57.17, 3.03, 5.06, 2.52, 0.86, 4.99, 1.64, 3.42, 2.54, 0.43, 0.76, 0.04, 0.06, 0.06]
)
SPREADS = HALVES * np.sqrt(3) / special.stdtrit(2, 0.975)
"""Standard deviations between its three seeds, from the half widths of its intervals."""
NOISE = ("equal", "README", "one small", "shared", "skewed")


class Rates(NamedTuple):
    """Shares of simulated studies, and the difference that most of them see."""

    wrong: float
    covered: float
    seen: float


def noise(name: str, shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Draw values of mean 0, shape (studies, seeds, values).

    Half of the variance can be shared by the values of a seed; skewed is exponential.
    """
    if name == "skewed":
        return rng.exponential(size=shape) - 1
    drawn, count = rng.standard_normal(shape), shape[-1]
    if name == "shared":
        return (drawn + rng.standard_normal((*shape[:2], 1))) / np.sqrt(2)
    scales = {"README": np.resize(SPREADS, count), "one small": np.r_[1e-3, np.ones(count - 1)]}
    return drawn * scales.get(name, 1.0)


def limits(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return by how much each mean must exceed the one at a study's place to be called worse."""
    seeds, count = values.shape[1:]
    mine = values.var(1, ddof=1) / seeds
    other = np.take_along_axis(mine, places, 1)
    freedom = (mine + other) ** 2 * (seeds - 1) / (mine**2 + other**2)
    grid = (seeds - 1) * np.geomspace(1, 2, 200)
    return np.sqrt(mine + other) * np.interp(freedom, grid, critical(count, grid))


def simulate(values: np.ndarray, means: np.ndarray | float = 0.0) -> Rates:
    """Judge studies, of equal values if their true means are not given: `noise` plus these."""
    (studies, seeds, count), found = values.shape, values.mean(1)
    best = found.argmin(1)[:, None]
    lowest = np.take_along_axis(found, best, 1)
    truth = np.take_along_axis(np.broadcast_to(means, (studies, count)), best, 1)
    wrong = ((found - lowest > limits(values, best)) & (means <= truth)).any(1)
    errors = values.std(1, ddof=1) / np.sqrt(seeds)
    half = special.stdtrit(seeds - 1, 0.975) * np.take_along_axis(errors, best, 1)
    bias = np.array([[selection_bias(*study)] for study in zip(found, errors, strict=True)])
    covered = (lowest - half < truth) & (truth < lowest + bias + half)
    needed = limits(values, np.zeros_like(best)) - (found - found[:, :1])
    return Rates(wrong.mean(), covered.mean(), np.quantile(needed[:, 1:], 0.8))


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.comparisons", description=__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--studies", type=int, default=40_000, help="default: 40000")
    studies, rng = options.parse_args().studies, np.random.default_rng(0)
    print("\n".join(machine.hardware(torch.device("cpu"), "numpy", "scipy")))
    print(f"{studies:,} studies a row; standard error at 5 %: {5 * (19 / studies) ** 0.5:.2f} %\n")
    rows = []
    for count, seeds in DESIGNS:
        rates = [simulate(noise(name, (studies, seeds, count), rng)) for name in NOISE]
        *normal, skewed = (rate.covered for rate in rates)
        shares = [*(rate.wrong for rate in rates), min(normal), skewed]
        cells = [f"{100 * share:.1f} %" for share in shares]
        rows.append([f"{count} x {seeds}", *cells, f"{rates[0].seen:.1f}"])
    header = ["values x seeds", *NOISE, "covered", "covered, skewed", "seen"]
    print(machine.table(header, rows))
    for seeds in (3, 5):
        values = MEANS + noise("README", (studies, seeds, len(MEANS)), rng)
        rates, best = simulate(values, MEANS), values.mean(1).argmin(1)[:, None]
        found = values.mean(1)[:, 10] - values.mean(1).min(1)
        one = found > limits(values, best)[:, 10]
        print(
            f"\nREADME's means, {seeds} seeds: weight 1 is worse in {100 * one.mean():.1f} % of "
            f"studies, a better value in {100 * rates.wrong:.2f} %; the winner's interval covers "
            f"in {100 * rates.covered:.1f} %."
        )


if __name__ == "__main__":
    main()
