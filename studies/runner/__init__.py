"""One runner for every study."""
