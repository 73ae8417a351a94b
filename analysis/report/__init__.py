"""Reports: a self-contained HTML page per study."""

from analysis.report.page import build as build
from analysis.report.page import index as index
