"""Datasets: images as uint8 tensors in three fixed parts, and where they are read from."""
