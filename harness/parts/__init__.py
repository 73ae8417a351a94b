"""Parts of a loss that are built in, written as a user would: likelihoods and loss terms."""
