"""The exact linear VAE of a dataset: probabilistic PCA in closed form."""
