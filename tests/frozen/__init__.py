"""Checks that stay as they are while the code below them is rewritten."""
