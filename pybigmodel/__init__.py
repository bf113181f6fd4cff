"""Drop-in PyTorch layers on kernels of their own."""

from __future__ import annotations

from pybigmodel import _library as _library  # first: loads the ops
from pybigmodel import integrations as integrations
from pybigmodel import nn as nn
from pybigmodel import ops as ops
from pybigmodel import reference as reference
from pybigmodel import testing as testing
from pybigmodel._configure import configure as configure
from pybigmodel._connect import calibrate as calibrate
from pybigmodel.freeze import freeze as freeze
from pybigmodel.integrations import sdpa as sdpa
from pybigmodel.optimize import optimize as optimize
from pybigmodel.optimize import report as report
from pybigmodel.optimize import restore as restore

__version__ = "0.1.0"
