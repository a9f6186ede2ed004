"""Efficient attention for images: exact, tested, and ready to plug in."""

from .engines.route import route
from .gate import Gate
from .grid import Grid
from .layout import OnMap, OnTokens
from .mixer import Mixer
from .pattern import Pattern
from .recommend import recommend
from .zoo import create_block, create_layer, describe, layer, list_blocks, register

__all__ = [
    "Gate",
    "Grid",
    "Mixer",
    "OnMap",
    "OnTokens",
    "Pattern",
    "create_block",
    "create_layer",
    "describe",
    "layer",
    "list_blocks",
    "recommend",
    "register",
    "route",
]
__version__ = "0.1.0"
