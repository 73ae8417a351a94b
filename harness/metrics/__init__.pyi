from . import evaluate as evaluate
from . import frechet as frechet
from . import information as information
from . import likelihood as likelihood
from . import pictures as pictures
from . import probes as probes
from . import quality as quality
