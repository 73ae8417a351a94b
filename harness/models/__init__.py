"""Networks, the VAE made of them, and stacks of VAEs."""
