"""Published methods, one file each. Adding a line here registers a method everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from vtprune import combining
from vtprune.errors import InvalidOptionError, UnknownMethodError, did_you_mean
from vtprune.method import Method, Sequential
from vtprune.methods.act import ACT as ACT
from vtprune.methods.as_vit import ASViT as ASViT
from vtprune.methods.atp_llava import ATPLLaVA as ATPLLaVA
from vtprune.methods.cdpruner import CDPruner as CDPruner
from vtprune.methods.dart import DART as DART
from vtprune.methods.divprune import DivPrune as DivPrune
from vtprune.methods.dycoke import DyCoke as DyCoke
from vtprune.methods.evs import EVS as EVS
from vtprune.methods.fastervlm import FasterVLM as FasterVLM
from vtprune.methods.fastv import FastV as FastV
from vtprune.methods.fastvid import FastVID as FastVID
from vtprune.methods.flowcut import FlowCut as FlowCut
from vtprune.methods.holov import HoloV as HoloV
from vtprune.methods.keep_all import KeepAll as KeepAll
from vtprune.methods.llava_scissor import LLaVAScissor as LLaVAScissor
from vtprune.methods.mstm import MSTM as MSTM
from vtprune.methods.own import VTPrune as VTPrune
from vtprune.methods.prumerge import PruMerge as PruMerge
from vtprune.methods.prumerge_plus import PruMergePlus as PruMergePlus
from vtprune.methods.pyramiddrop import PyramidDrop as PyramidDrop
from vtprune.methods.random import Random as Random
from vtprune.methods.random_ltd import RandomLTD as RandomLTD
from vtprune.methods.rollout import Rollout as Rollout
from vtprune.methods.sparsevlm import SparseVLM as SparseVLM
from vtprune.methods.spatten import SpAtten as SpAtten
from vtprune.methods.stella import Stella as Stella
from vtprune.methods.stride import Stride as Stride
from vtprune.methods.submodular import Submodular as Submodular
from vtprune.methods.tome import ToMe as ToMe
from vtprune.methods.ucofia import UCoFiA as UCoFiA
from vtprune.methods.vflowopt import VFlowOpt as VFlowOpt
from vtprune.methods.visionzip import VisionZip as VisionZip
from vtprune.methods.vispruner import VisPruner as VisPruner
from vtprune.methods.vtc_cls import VTCCls as VTCCls

REGISTRY: dict[str, type[Method]] = {
    cls.key: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, Method) and cls not in (Method, Sequential)
}


def method_class(name: str) -> type[Method]:
    """The class registered under a key.

    Raises:
        UnknownMethodError: no such key; names the nearest ones.
    """
    try:
        return REGISTRY[name]
    except KeyError:
        raise UnknownMethodError(f"there is no method {name!r}. {did_you_mean(name, REGISTRY)}") from None


def create(name: str, **options: object) -> Method:
    """A method from its registry key and options, or a combination from "scorer|part|part" (:mod:`vtprune.combining`).

    Raises:
        UnknownMethodError: no such key.
        InvalidOptionError: unknown, missing or out-of-range option.
    """
    if combining.BETWEEN in name:
        keep: Any = options.pop("keep", None)
        return combining.parse(name, keep, **options)
    cls = method_class(name)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    known = [f.name for f in fields]
    for option in options:
        if option not in known:
            raise InvalidOptionError(
                f"method {name!r} has no option {option!r}. {did_you_mean(option, known)}"
            )
    for f in fields:
        if f.name not in options and f.default is f.default_factory is dataclasses.MISSING:
            what = (
                "tokens per picture (an int) or a share of them (a float), e.g. keep=64"
                if f.name == "keep"
                else f.name
            )
            raise InvalidOptionError(f"method {name!r} needs {what}. Options: {', '.join(known)}.")
    try:
        return cls(**options)  # type: ignore[arg-type]
    except TypeError as error:
        raise InvalidOptionError(f"method {name!r}: {error}. Options: {', '.join(known)}.") from error
