"""blaq: train neural networks whose weights take 1 to 8 bits, by loss-aware quantization.

The names below need torch alone; training, tasks and the command need the extras ``blaq[train]`` and ``blaq[hf]``.
"""

from blaq.grids import Grid
from blaq.optim.blaq import BLAQ
from blaq.optim.groups import param_groups
from blaq.optim.laq import LAQ
from blaq.optim.plan import Plan, plan
from blaq.projection import Quantized, project

__all__ = ["BLAQ", "LAQ", "Grid", "Plan", "Quantized", "param_groups", "plan", "project"]
__version__ = "0.1.0"
