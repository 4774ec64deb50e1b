"""Generative Actor Critic: learn p(trajectory, return), plan by inference, act fast.

    run_dir = gac_fast.train("pointmaze-umaze-v0", gac_fast.preset("pointmaze-umaze"))
    policy = gac_fast.load(run_dir)
    actor = policy.exploiting(policy.exploit(n=64))
    result = gac_fast.evaluate(policy, "pointmaze-umaze", episodes=256, seed=0)
    better = gac_fast.load(gac_fast.finetune(run_dir, "pointmaze-umaze"))

Everything is imported on first use: ``import gac_fast`` alone loads neither torch nor a simulator.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gac_fast import errors
from gac_fast._version import __version__
from gac_fast.errors import BackendError, CheckpointError, ConfigError, DataError, EnvError, GacError

if TYPE_CHECKING:
    from inspect import Signature

    from gac_fast.act import Actor
    from gac_fast.config import Config, preset
    from gac_fast.data import Trajectories
    from gac_fast.evaluate import EvalResult, evaluate
    from gac_fast.plan import Plans
    from gac_fast.policy import Policy, load
    from gac_fast.train.offline import train
    from gac_fast.train.online import finetune

__all__ = [
    "Actor",
    "BackendError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "EnvError",
    "EvalResult",
    "GacError",
    "Plans",
    "Policy",
    "Trajectories",
    "__version__",
    "errors",
    "evaluate",
    "finetune",
    "load",
    "preset",
    "train",
]

_HOME = {
    "Actor": "gac_fast.act",
    "Config": "gac_fast.config",
    "EvalResult": "gac_fast.evaluate",
    "Plans": "gac_fast.plan",
    "Policy": "gac_fast.policy",
    "Trajectories": "gac_fast.data",
    "finetune": "gac_fast.train.online",
    "load": "gac_fast.policy",
    "preset": "gac_fast.config",
}
_SUBMODULES = ("config", "data", "envs", "evaluate", "ops", "train")

# `gac_fast.train` and `gac_fast.evaluate` each name a submodule and a public function, and whenever such a submodule is
# imported, by whomever, Python binds the name here to the module. So the module itself can be called: the package, told
# of the binding by __setattr__, gives it a class whose call is the function's. Both uses work in any order of imports.
_CALLED = {"gac_fast.evaluate": "gac_fast.evaluate", "gac_fast.train": "gac_fast.train.offline"}


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _called_function(self)(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        from inspect import signature

        return signature(_called_function(self))


def _called_function(module: ModuleType) -> Any:
    return getattr(importlib.import_module(_CALLED[module.__name__]), module.__name__.rpartition(".")[2])


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) is ModuleType and value.__name__ in _CALLED:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
