from . import checkpoint as checkpoint
from . import draws as draws
from . import engine as engine
from . import group as group
from . import mlp_gradient as mlp_gradient
from . import state as state
from . import step as step
