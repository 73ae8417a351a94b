"""Studies: one page each, run as `python -m studies.NAME`."""
