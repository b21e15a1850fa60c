"""vtprune: visual token pruning that is provably real on stock vision-language models.

Importing it changes nothing in any other library.
"""

from __future__ import annotations

from vtprune import methods
from vtprune.combining import combine
from vtprune.errors import (
    AlreadyPatchedError,
    InertPruningError,
    InvalidOptionError,
    NonFiniteScoresError,
    UnknownMethodError,
    UnsupportedCallError,
    UnsupportedMethodError,
    UnsupportedModelError,
    VTPruneError,
)
from vtprune.layout import TokenLayout
from vtprune.method import Bypass, BypassView, Method, ModelFacts, Scored, Signal, Site, Stage, View, compose
from vtprune.patch import ModelSupport, Patch, list_methods, list_models, patch, unpatch
from vtprune.report import Report
from vtprune.selection import Selection

__version__ = "0.1.0"

__all__ = [
    "AlreadyPatchedError",
    "Bypass",
    "BypassView",
    "InertPruningError",
    "InvalidOptionError",
    "Method",
    "ModelFacts",
    "ModelSupport",
    "NonFiniteScoresError",
    "Patch",
    "Report",
    "Scored",
    "Selection",
    "Signal",
    "Site",
    "Stage",
    "TokenLayout",
    "UnknownMethodError",
    "UnsupportedCallError",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "VTPruneError",
    "View",
    "combine",
    "compose",
    "list_methods",
    "list_models",
    "methods",
    "patch",
    "unpatch",
]
