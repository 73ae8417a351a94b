"""Pictures: right pixels in the right place."""

import numpy as np
import torch

from harness.config import RunConfig
from harness.metrics import pictures
from harness.models.vae import build


def test_a_grid_places_rows_and_columns():
    images = torch.zeros(2, 3, 1, 8, 8)
    images[1, 2] = 1.0
    picture = pictures.grid(images)
    zoom = pictures.CELL // 8
    cell = 8 * zoom + 2
    assert picture.shape == (2 * cell, 3 * cell)
    assert picture.dtype == np.uint8
    assert (picture[cell:, 2 * cell :] == 255).all()
    assert picture[1 : cell - 1, 1 : cell - 1].max() == 0  # inside the white line


def test_a_grid_of_colour_images_has_three_channels_and_keeps_them_apart():
    red = torch.zeros(1, 1, 3, 4, 5)
    red[:, :, 0] = 1.0
    picture = pictures.grid(red)
    assert picture.shape[2] == 3
    middle = picture[picture.shape[0] // 2, picture.shape[1] // 2]
    assert middle.tolist() == [255, 0, 0]


def test_pixels_outside_the_unit_interval_are_clipped():
    images = torch.tensor([-3.0, 4.0]).repeat_interleave(64).reshape(1, 2, 1, 8, 8)
    picture = pictures.grid(images)
    assert picture.min() == 0
    assert picture.max() == 255


def test_originals_stand_above_their_reconstructions_a_model_a_row(data):
    models = [build(RunConfig(latent_size=size, seed=1), data.image_shape) for size in (2, 5)]
    drawn = pictures.reconstructions(models, data.val, images=4)
    x = data.val.pixels(slice(4), torch.float32).view(-1, 1, 8, 8)
    with torch.no_grad():
        expected = pictures.grid(torch.stack([x, *(model(x) for model in models)]))
    assert np.array_equal(drawn, expected)
    above = pictures.reconstructions(models[:1], data.val, images=4)
    assert np.array_equal(above, expected[: len(above)])


def test_samples_of_models_stand_below_each_other(data):
    models = [build(RunConfig(latent_size=size, seed=1), data.image_shape) for size in (2, 5)]
    drawn = pictures.sample_rows(models, seed=3, columns=4)
    first, second = (pictures.prior_samples(model, 3, rows=1, columns=4) for model in models)
    assert np.array_equal(drawn, np.concatenate([first, second]))


def test_prior_samples_are_the_same_at_every_call_and_differ_by_seed(data):
    first = build(RunConfig(), data.image_shape)
    assert np.array_equal(pictures.prior_samples(first, 0), pictures.prior_samples(first, 0))
    assert not np.array_equal(pictures.prior_samples(first, 0), pictures.prior_samples(first, 1))


def test_traversals_put_the_latent_with_most_kl_first(data):
    run = build(RunConfig(latent_size=3), data.image_shape)
    with torch.no_grad():
        run.encoder[-1].weight[1] *= 200  # latent 1 now varies most
        run.decoder[0].weight.zero_()
        run.decoder[0].weight[:, 1] = 1.0  # and alone reaches the decoder
    picture = pictures.traversals(run, data, columns=5)
    rows = picture.reshape(3, -1, picture.shape[1]).astype(int)
    assert np.ptp(rows[0][:, 2:-2], axis=1).max() > 0
    cell = picture.shape[1] // 5
    columns = rows[1].reshape(rows.shape[1], 5, cell)
    assert (columns == columns[:, :1]).all()  # an unused latent changes nothing along its row


def test_traversals_of_an_autoencoder_put_the_latent_that_varies_most_first(data):
    run = build(RunConfig(latent="deterministic", kl_weight=0, latent_size=3), data.image_shape)
    with torch.no_grad():
        run.encoder[-1].weight[1] *= 20
        run.encoder[-1].bias[5] += 9  # an untrained log-variance is close to 0
        run.decoder[0].weight.zero_()
        run.decoder[0].weight[:, 1] = 1.0
    picture = pictures.traversals(run, data, columns=5)
    cells = picture.reshape(3, picture.shape[0] // 3, 5, -1).astype(int)
    assert [np.ptp(row, axis=1).max() > 0 for row in cells] == [True, False, False]


def test_interpolations_begin_and_end_at_the_reconstructions(data):
    run = build(RunConfig(), data.image_shape)
    picture = pictures.interpolations(run, data.val, rows=1, columns=4)
    x = data.val.pixels(slice(2), torch.float32).view(-1, 1, 8, 8)
    with torch.no_grad():
        ends = pictures.grid(run(x).unsqueeze(0))
    cell = ends.shape[1] // 2
    assert np.abs(picture[:, :cell].astype(int) - ends[:, :cell]).max() <= 1
    assert np.abs(picture[:, -cell:].astype(int) - ends[:, cell:]).max() <= 1
