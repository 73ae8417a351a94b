"""Linear algebra of a dataset against an independent implementation and reference numbers."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from harness import load_dataset, oracle


@pytest.mark.parametrize("latent_size", [1, 10, 63])
def test_the_floor_is_the_error_of_scikit_learns_projection(data, latent_size):
    known = PCA(latent_size, svd_solver="full").fit(oracle.pixels(data.train))
    for split in (data.train, data.test):
        x = oracle.pixels(split)
        again = known.inverse_transform(known.transform(x))
        floor = oracle.pca(data).floor(split, latent_size)
        assert floor == pytest.approx(np.square(x - again).mean(), rel=1e-9)


def test_the_floor_of_the_training_split_is_the_sum_of_the_discarded_eigenvalues(data):
    known = oracle.pca(data)
    expected = known.variances[10:].sum() / data.pixels
    assert known.floor(data.train, 10) == pytest.approx(expected, rel=1e-9)
    assert known.floor(data.train, data.pixels) == 0


def test_the_floors_of_mnist_are_those_of_the_reference(mnist_folder):
    known = load_dataset("mnist", mnist_folder)
    # The reference is of all 60,000 training images; 5,000 of them are our validation split.
    floors = {2: 0.05567, 10: 0.03407, 20: 0.02354, 50: 0.01149}
    for size, floor in floors.items():
        assert oracle.pca(known).floor(known.test, size) == pytest.approx(floor, abs=3e-5)
