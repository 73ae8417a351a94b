from . import pca as pca
from . import vae as vae
