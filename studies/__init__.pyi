from .runner.cli import main as main
from .study import Axis as Axis
from .study import Study as Study
from .study import run as run
