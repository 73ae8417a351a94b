from .runner.cli import main as main
from .runner.cli import run as run
from .runner.study import Axis as Axis
from .runner.study import Study as Study
