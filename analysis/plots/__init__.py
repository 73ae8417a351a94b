"""Figures: a frame of runs in, a matplotlib figure out."""

from analysis.plots.along_axis import HEAT_MAP_CAPTION as HEAT_MAP_CAPTION
from analysis.plots.along_axis import class_errors as class_errors
from analysis.plots.along_axis import conditions as conditions
from analysis.plots.along_axis import conventions as conventions
from analysis.plots.along_axis import heat_map as heat_map
from analysis.plots.along_axis import metrics_along_axis as metrics_along_axis
from analysis.plots.along_axis import metrics_along_latent_size as metrics_along_latent_size
from analysis.plots.along_axis import one_curve as one_curve
from analysis.plots.along_axis import quality_along_axis as quality_along_axis
from analysis.plots.along_axis import usual as usual
from analysis.plots.curves import CURVES_CAPTION as CURVES_CAPTION
from analysis.plots.curves import learning_curves as learning_curves
from analysis.plots.latents import KL_CAPTION as KL_CAPTION
from analysis.plots.latents import kl_per_latent as kl_per_latent
from analysis.plots.latents import latent_scatter as latent_scatter
from analysis.plots.planes import frontier as frontier
from analysis.plots.planes import rate_distortion as rate_distortion
from analysis.plots.search import search_front as search_front
from analysis.plots.search import search_history as search_history
from analysis.plots.search import search_importances as search_importances
from analysis.plots.search import search_parameters as search_parameters
from analysis.plots.style import of_a_table as of_a_table
from analysis.plots.style import plain_text as plain_text
