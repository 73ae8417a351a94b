"""The weights of the exact linear VAE, of the example."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "linear_vae.py"

linear_vae = runpy.run_path(str(EXAMPLE))["linear_vae"]
