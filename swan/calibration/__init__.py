"""Offline calibration: moments of a model's activations, bases from them, plans, and the file that keeps them."""

from swan.calibration.artifact import Calibration as Calibration
from swan.calibration.artifact import calibrate as calibrate
from swan.calibration.bases import Basis as Basis
from swan.calibration.bases import LayerBases as LayerBases
from swan.calibration.plan import Plan as Plan
