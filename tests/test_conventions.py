"""Conventions against own versions of the codebases' losses, written from their formulas."""

import json
import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from harness import RunConfig, conventions, objective
from harness.conventions import translate
from harness.metrics.evaluate import coefficients
from studies import translate as command

B, L, SHAPE = 4, 6, (3, 5, 4)
D = math.prod(SHAPE)


def kl(mu: Tensor, v: Tensor) -> Tensor:
    return (mu.square() + v.exp() - v - 1) / 2


def pm(x: Tensor) -> Tensor:
    """Pixels from -1 to 1."""
    return 2 * x - 1


def sse(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().sum()


def bce(x: Tensor, y: Tensor) -> Tensor:
    return -(x * y.log() + (1 - x) * (1 - y).log())


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def l1_kl(weight: float) -> Loss:
    return lambda x, y, mu, v: (pm(x) - pm(y)).abs().sum() / B + weight * kl(mu, v).sum() / B


def plain_bce(weight: float) -> Loss:
    return lambda x, y, mu, v: bce(x, y).sum() / B + weight * kl(mu, v).sum(1).mean()


# The losses of the codebases, of pixels x and outputs y from 0 to 1, posterior means and
# log-variances; as each of them sums and averages.
LOSSES: dict[str, Loss] = {
    "blog": lambda x, y, mu, v: functional.mse_loss(y, x) + kl(mu, v).sum() / (B * D),
    "pytorch_vae": lambda x, y, mu, v: (
        functional.mse_loss(y, x) + 0.00025 * (-0.5 * (1 + v - mu**2 - v.exp()).sum(1)).mean(0)
    ),
    "pytorch_vae_bhvae": lambda x, y, mu, v: (
        functional.mse_loss(y, x) + 10 * 0.00025 * kl(mu, v).sum(1).mean()
    ),
    "pytorch_vae_2020": lambda x, y, mu, v: (
        functional.mse_loss(pm(y), pm(x)) + B / 162_770 * kl(mu, v).sum(1).mean()
    ),
    "pythae": lambda x, y, mu, v: (
        0.5 * (x - y).square().flatten(1).sum(1) + kl(mu, v).sum(1)
    ).mean(),
    "lightning_bolts": lambda x, y, mu, v: functional.mse_loss(y, x) + 0.1 * kl(mu, v).mean(),
    "disentangling_vae": lambda x, y, mu, v: (
        functional.mse_loss(y * 255, x * 255, reduction="sum") / 255 / B
        + 4 * kl(mu, v).mean(0).sum()
    ),
    "disentangling_vae_plain": lambda x, y, mu, v: (
        functional.mse_loss(y * 255, x * 255, reduction="sum") / 255 / B + kl(mu, v).mean(0).sum()
    ),
    "beta_vae_1konny": lambda x, y, mu, v: sse(x, y) / B + 4 * kl(mu, v).sum(1).mean(),
    "disentanglement_lib": lambda x, y, mu, v: sse(x, y) / B + kl(mu, v).sum(1).mean(),
    "world_models": lambda x, y, mu, v: (
        (x - y).square().flatten(1).sum(1).mean() + kl(mu, v).sum(1).mean()
    ),
    "world_models_pytorch": lambda x, y, mu, v: (
        functional.mse_loss(y, x, reduction="sum") - 0.5 * (1 + v - mu.square() - v.exp()).sum()
    ),
    "world_models_adsp": lambda x, y, mu, v: (
        1000 * (x - y).square().flatten(1).mean(1).mean()
        - 0.5 * (1 + v - mu.square() - v.exp()).mean()
    ),
    "svg": lambda x, y, mu, v: functional.mse_loss(y, x) + 1e-4 * kl(mu, v).sum() / B,
    "sigma_vae": lambda x, y, mu, v: (
        (D * B / 2 * (x - y).square().mean().log() + D * B / 2) + kl(mu, v).sum()
    ),
    "sigma_vae_mse": lambda x, y, mu, v: functional.mse_loss(y, x) + kl(mu, v).sum(),
    "diffusers": lambda x, y, mu, v: sse(pm(x), pm(y)) / B + 1e-6 * kl(mu, v).sum() / B,
    "pytorch_examples": lambda x, y, mu, v: (
        functional.binary_cross_entropy(y, x, reduction="sum")
        - 0.5 * (1 + v - mu**2 - v.exp()).sum()
    ),
    "keras": lambda x, y, mu, v: bce(x, y).mean(1).sum((1, 2)).mean() + kl(mu, v).sum(1).mean(),
    "chollet_2017": lambda x, y, mu, v: (
        bce(x, y).flatten(1).mean(1) - 5e-4 * (1 + v - mu**2 - v.exp()).mean(1)
    ).mean(),
    "chollet_2021": lambda x, y, mu, v: bce(x, y).sum((1, 2, 3)).mean() + kl(mu, v).mean(),
    "tensorflow": plain_bce(1),
    "pyro": plain_bce(1),
    "jackson_kang": lambda x, y, mu, v: bce(x, y).sum() + kl(mu, v).sum(),
    "disentangling_vae_bernoulli": plain_bce(4),
    "beta_vae_1konny_dsprites": plain_bce(4),
    "disentanglement_lib_bernoulli": plain_bce(1),
    "trellis": lambda x, y, mu, v: bce(x, y).mean() + 1e-6 * kl(mu, v).mean(),
    "latent_diffusion": l1_kl(1e-6),
    "mar": l1_kl(1e-6),
    "eq_vae": l1_kl(1e-6),
    "va_vae": l1_kl(1e-6),
    "va_vae_pp_style": lambda x, y, mu, v: (
        (pm(x) - pm(y)).abs().mean() - 1e-6 * (1 + v - mu**2 - v.exp()).mean()
    ),
    "disentangling_vae_laplace": lambda x, y, mu, v: (
        3 * (x - y).abs().sum() / B + 4 * kl(mu, v).sum(1).mean()
    ),
    "repa_e": lambda x, y, mu, v: (pm(x) - pm(y)).abs().mean() + 1e-6 * kl(mu, v).sum() / B,
    # The B images are one clip of 17 frames: the KL of the clip beside the error of a frame.
    "open_sora_plan": lambda x, y, mu, v: (
        (pm(x) - pm(y)).abs().sum() / B + 1e-6 * 17 * kl(mu, v).sum() / B
    ),
    # With its log scale s at the best value, where ds = 0: it is trained beside the weights.
    "generative_models": lambda x, y, mu, v: (
        (pm(x) - pm(y)).abs().sum() / B / (pm(x) - pm(y)).abs().mean().detach()
        + kl(mu, v).sum() / B
    ),
    "mosaicml_diffusion": lambda x, y, mu, v: (
        (pm(x) - pm(y)).abs().mean() / (pm(x) - pm(y)).abs().mean().detach()
        + L / D * kl(mu, v).mean()
    ),
}


def drawn() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    a, mu, v = (
        torch.randn(B, *s, dtype=torch.float64).requires_grad_() for s in (SHAPE, (L,), (L,))
    )
    return torch.rand(B, *SHAPE, dtype=torch.float64), a, mu, v


def ours(config: RunConfig, factor: float = 1.0) -> list[Tensor]:
    x, a, mu, v = drawn()
    y = a.sigmoid()
    scale = (x - y).abs().mean().detach() if config.sigma == "learned" else None
    batch = objective.Batch(x, objective.Posterior(mu, v), mu, a, y, scale)
    known = coefficients(config, D, x.device)
    loss = objective.objective(config, batch, known._replace(beta=known.beta * factor))
    return list(torch.autograd.grad(loss, (a, mu, v)))


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest difference of two gradients up to a factor, relative to each part.

    A cosine of whole gradients would hide a KL that is 10^9 times smaller than the error.
    """
    factor = first[0].norm() / second[0].norm()
    return max(
        float((a - factor * b).norm() / a.norm()) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("name", conventions.conventions())
def test_the_gradient_of_a_codebases_loss_has_the_direction_of_its_translation(name):
    x, a, mu, v = drawn()
    theirs = list(torch.autograd.grad(LOSSES[name](x, a.sigmoid(), mu, v), (a, mu, v)))
    config = translate(name, shape=SHAPE, latent_size=L, batch_size=B).config
    assert distance(theirs, ours(config)) < 1e-9
    assert distance(theirs, ours(config, 1.01)) > 1e-3


# beta of the defaults, as docs/conventions.md has them from the sources.
DEFAULTS = {
    "blog": 1,
    "pytorch_vae": 3.072,
    "pytorch_vae_bhvae": 30.72,
    "pytorch_vae_2020": 144 / 162_770 * 12_288 / 4,
    "pythae": 2,
    "lightning_bolts": 1.2,
    "disentangling_vae": 4 / 255,
    "disentangling_vae_plain": 1 / 255,
    "beta_vae_1konny": 4,
    "disentanglement_lib": 1,
    "world_models": 1,
    "world_models_pytorch": 1,
    "world_models_adsp": 0.384,
    "svg": 0.4096,
    "sigma_vae_mse": 301_056,
    "diffusers": 2.5e-7,
    "pytorch_examples": 1,
    "keras": 1,
    "chollet_2017": 0.392,
    "chollet_2021": 0.5,
    "latent_diffusion": 5e-7,
    "repa_e": 0.098304,
    "va_vae_pp_style": 2.4e-5,
    "disentangling_vae_laplace": 4 / 3,
    "open_sora_plan": 8.5e-6,
    "trellis": 8e-6,
    "sigma_vae": None,
    "generative_models": None,
}


@pytest.mark.parametrize(("name", "beta"), DEFAULTS.items(), ids=DEFAULTS.keys())
def test_the_weight_of_a_codebases_defaults(name, beta):
    found = translate(name)
    assert found.beta == (None if beta is None else pytest.approx(beta, rel=1e-12))
    data = conventions.conventions()[name].data
    variance, scale = found.decoder_variance, found.laplace_scale
    assert variance == (beta / 2 if beta and data == "mse" else None) or variance == pytest.approx(
        beta / 2, rel=1e-12
    )
    assert (scale is None) == (data != "l1" or beta is None)
    assert (found.grey_levels is None) == (variance is None and scale is None)


def test_the_same_1e_6_is_196608_times_larger_in_another_codebase():
    small, large = translate("latent_diffusion"), translate("repa_e")
    assert large.laplace_scale / small.laplace_scale == pytest.approx(3 * 256 * 256, rel=1e-12)


@pytest.mark.parametrize("normalization", ["pixels", "batch", "latent", "sum"])
def test_equal_weights_have_one_beta_in_every_normalization(normalization):
    found = translate("pytorch_vae", weight=0.01, shape=(3, 32, 32), latent_size=7, batch_size=9)
    weight = found.equal_weights[normalization]
    config = RunConfig(
        kl_weight=weight, kl_normalization=normalization, latent_size=7, batch_size=9
    )
    assert objective.beta(config, 3 * 32 * 32) == pytest.approx(found.beta, rel=1e-12)
    assert found.beta == pytest.approx(0.01 * 3072, rel=1e-12)


@pytest.mark.parametrize("name", conventions.conventions())
def test_a_pasted_configuration_has_its_beta_on_images_of_any_size(name):
    config = RunConfig.from_convention(name, latent_size=12, batch_size=20)
    for shape in ((1, 8, 8), (1, 28, 28)):
        convention = conventions.find(name, shape=shape, latent_size=12, batch_size=20)
        factor = 3 if name == "keras" else 1  # colours
        assert factor * objective.beta(config, math.prod(shape)) == pytest.approx(
            factor * convention.beta, rel=1e-12
        )
    assert (config.latent_size, config.batch_size) == (12, 20)


def test_the_blogs_recipe_is_a_convention_and_keywords_override_it():
    assert RunConfig.from_convention("blog") == RunConfig.seed_recipe()
    assert RunConfig.seed_recipe(latent="deterministic").kl_weight == 0
    config = RunConfig.from_convention("pytorch_vae", kl_weight=0.5, epochs=3)
    assert (config.kl_weight, config.epochs, config.latent_size) == (0.5, 3, 128)
    assert RunConfig.from_convention("keras").likelihood == "bernoulli"
    assert RunConfig.from_convention("tensorflow").has_likelihood


LOSS_FORMS = {
    "mse:mean + 0.00025*kl:sum": 0.00025 * 784,
    "  0.00025 * kl : sum+mse:mean": 0.00025 * 784,
    "0.5*mse:sum+kl:sum": 2,
    "1e+2*mse:total + 3e-1*kl:total": 0.003,
    "mse:sum + 5*kl:mean": 0.5,
    "bce:total+1*kl:total": 1,
    "mse:mean + kl:total": 784 * 32,
    "2*l1:sum + 1*kl:sum": 0.5,
}


@pytest.mark.parametrize(("loss", "beta"), LOSS_FORMS.items())
def test_a_loss_is_read_in_any_order_with_any_spaces(loss, beta):
    assert translate(loss).beta == pytest.approx(beta, rel=1e-12)


def test_pixels_of_another_range_change_the_squared_error_twice():
    wide = translate("mse:sum + 1*kl:sum", pixels=(-1, 1))
    assert wide.beta == pytest.approx(1 / 4, rel=1e-12)
    assert translate("l1:sum + 1*kl:sum", pixels=(-1, 1)).laplace_scale == pytest.approx(1 / 2)
    grey = translate("mse:sum + 1*kl:sum", pixels=(0, 255))
    assert grey.grey_levels == pytest.approx(math.sqrt(0.5), rel=1e-12)


REFUSED = {
    "--loss kl+mse:mean": "'kl' cannot be read; give [factor*]DATA:REDUCTION + weight*kl:REDUCTION",
    "--loss mse:avg+kl:sum": "'mse:avg' cannot be read; give",
    "--loss foo:mean+kl:sum": "where DATA is mse, l1 or bce, REDUCTION mean, sum or total",
    "--loss mse:mean-kl:sum": "'mse:mean-kl:sum' cannot be read",
    "--loss x*mse:mean+kl:sum": "'x*mse:mean' cannot be read",
    "--loss mse:mean+nan*kl:sum": "'nan*kl:sum' cannot be read",
    "--loss mse:mean+1e999*kl:sum": "weight=inf: give a finite number",
    "--loss mse:mean": "lacks a term; give [factor*]DATA:REDUCTION + weight*kl:REDUCTION",
    "--loss mse:mean+l1:sum": "'l1:sum' cannot be read",
    "--loss mse:mean+kl:sum+": "'' cannot be read",
    "--loss 0*mse:mean+kl:sum": "factor=0.0: give a finite number > 0",
    "--loss bce:sum+kl:sum --pixels -1 1": "cross-entropy needs pixels from 0 to 1",
    "--loss kl": "or give a loss [factor*]DATA",
    "keras --pixels 0 255": "cross-entropy needs pixels from 0 to 1",
    "kera": "choose among keras",
    "blog --loss mse:mean+kl:sum": "give one of the two",
    "blog --latent-size 0": "latent_size=0: give a whole number >= 1",
    "blog --shape 3 0 4": "shape=0: give a whole number >= 1",
    "blog --weight -1": "weight=-1.0: give a finite number >= 0",
    "blog --pixels 1 1": "pixels=(1.0, 1.0): give the lowest and the highest value",
    "pytorch_vae_2020 --training-size 0": "training_size=0: give a whole number >= 1",
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.items(), ids=REFUSED.keys())
def test_what_cannot_be_translated_is_one_line(words, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(words.split())
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert expected in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_json_has_the_numbers_with_null_for_what_there_is_not(capsys):
    command.main(["--loss", "mse:mean + 0.00025*kl:sum", "--shape", "3", "64", "64", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["beta"] == pytest.approx(3.072)
    assert found["laplace_scale"] is None
    assert set(found["equal_weights"]) == {"pixels", "batch", "latent", "sum"}
    assert found["warnings"] == []


def test_a_translation_is_read_at_80_columns_and_its_line_can_be_pasted(capsys):
    for name in conventions.conventions():
        command.main([name])
        lines = capsys.readouterr().out.splitlines()
        pasted = next(line for line in lines if line.startswith("RunConfig("))
        assert eval(pasted) == translate(name).config
        assert all(len(line) <= 80 for line in lines if line != pasted)
    command.main([])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(conventions.conventions())
    assert max(map(len, listed)) <= 80


def test_the_table_has_a_source_for_every_convention():
    text = Path(conventions.__file__).with_suffix(".toml").read_text()
    for row in tomllib.loads(text).values():
        assert row["source"]
        assert all(note == note.strip(". ") for note in row.get("notes", []))


def table() -> str:
    """Return the table of docs/conventions.md."""
    lines = [
        "| name | loss | images, latents, batch | beta | decoder variance or scale b | read in |",
        "|---|---|---|--:|--:|---|",
    ]
    for name, row in conventions.conventions().items():
        found, shape = translate(name), " x ".join(map(str, row.shape))
        wide = "" if row.pixels == (0, 1) else ", pixels {:g} to {:g}".format(*row.pixels)
        variance, scale = found.decoder_variance, found.laplace_scale
        means = {"optimal": "fitted", "learned": "learned"}.get(row.scale, "no ELBO of grey pixels")
        means = means if variance is None else f"{variance:.3g}"
        means = means if scale is None else f"b {scale:.3g}"
        means = "exact, binary pixels" if name == "tensorflow" else means
        beta = "1, exact" if found.beta is None else f"{found.beta:,.4g}"
        cells = (
            f"`{name}`",
            f"`{row.loss}`{wide}",
            f"{shape}, {row.latent_size}, {row.batch_size}",
        )
        lines.append("| " + " | ".join((*cells, beta, means, row.source)) + " |")
    return "\n".join(lines)


def test_the_pages_table_is_that_of_the_data():
    page = (Path(__file__).resolve().parents[1] / "docs" / "conventions.md").read_text()
    assert table() in page, f"the table of docs/conventions.md should be:\n\n{table()}"
