"""The exact linear VAE of a dataset: probabilistic PCA in closed form."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
