from . import files as files
from . import networks as networks
from . import stack as stack
from . import vae as vae
