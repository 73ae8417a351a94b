"""Claims of papers, and how each is judged."""
