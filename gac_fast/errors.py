"""The errors users see: one sentence naming the thing, what was expected and what came."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gac_fast.rollout import Rollout

__all__ = ["BackendError", "CheckpointError", "ConfigError", "DataError", "EngineWarning", "EnvError", "GacError"]


class GacError(Exception):
    """Base of every error that gac_fast raises about its input."""


class DataError(GacError, ValueError):
    """A dataset, file or array is not what it should be."""


class ConfigError(GacError, ValueError):
    """A flag or configuration value is out of range or does not fit another."""


class CheckpointError(GacError, RuntimeError):
    """A checkpoint is damaged, incomplete or of another model or environment."""


class BackendError(GacError, RuntimeError):
    """A forced backend, or a forced path of the C++ engine, cannot run the op at hand."""


class EnvError(GacError, RuntimeError):
    """An environment is unknown, crashed, or does not fit the policy."""

    environment: int | None = None
    """Row of the vector in which it happened, where that is known."""
    step: int | None = None
    """Step of the episode, from 1, at which a rollout ended; 0 for its reset."""
    finished: Rollout | None = None
    """What a rollout had finished by then."""


class EngineWarning(RuntimeWarning):
    """An op that has a faster engine runs on the reference, since that engine is missing."""
