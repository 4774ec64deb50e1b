"""Minari datasets by id, installed locally or downloadable."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import numpy as np

from gac_fast.data.arrays import Bounds, check_actions, check_finite, resolve_bounds, sum_in_order, warn_of_cuts
from gac_fast.data.trajectories import Trajectories
from gac_fast.errors import DataError

__all__ = ["load_minari"]


def load_minari(
    dataset_id: str,
    *,
    observation_key: str | None = None,
    action_bounds: Bounds | None = None,
    download: bool = True,
    keep_rewards: bool = False,
) -> Trajectories:
    """Read a Minari dataset, episode by episode.

    Episodes that neither terminated nor were truncated are marked as cut (``complete`` False).

    Args:
        dataset_id: for example 'mujoco/hopper/medium-v0'.
        observation_key: which entry to take of dictionary observations, for example 'observation'.
        action_bounds: (low, high), scalars or [act_dim]; default those of the dataset's action space.
        download: fetch the dataset when it is not installed.
        keep_rewards: keep the reward of every step too, which nothing but a return to go needs.

    Raises:
        DataError: the id is unknown here and cannot be downloaded, its spaces are not flat and continuous, or its
            values are not finite or out of bounds.
    """
    dataset = _open(dataset_id, download)
    what = f"Minari dataset {dataset_id!r}"
    obs_dim = _flat_dim(_observation_space(dataset, observation_key, what), f"{what}: observation space")
    action_space = dataset.action_space
    act_dim = _flat_dim(action_space, f"{what}: action space")
    bounds = action_bounds if action_bounds is not None else (action_space.low, action_space.high)
    low, high = resolve_bounds(bounds, None, act_dim, what)

    n_steps, n_episodes = int(dataset.total_steps), int(dataset.total_episodes)
    if n_episodes == 0:
        raise DataError(f"{what}: expected at least one episode, it is empty")
    observations = np.empty((n_steps, obs_dim), np.float32)
    actions = np.empty((n_steps, act_dim), np.float32)
    cu_seqlens = np.zeros(n_episodes + 1, np.int64)
    returns = np.empty(n_episodes)
    rewards = np.empty(n_steps, np.float32) if keep_rewards else None
    complete = np.empty(n_episodes, np.bool_)
    try:
        # The storage iterates with its file open; the dataset's own iterator opens it anew for every episode.
        for i, episode in enumerate(dataset.storage.get_episodes(dataset.episode_indices)):
            where = f"{what}: episode {i}"
            length = len(episode["rewards"])
            if length == 0:
                raise DataError(f"{where} is empty: expected at least one step")
            values = episode["observations"] if observation_key is None else episode["observations"][observation_key]
            start, stop = int(cu_seqlens[i]), int(cu_seqlens[i]) + length
            if stop > n_steps:
                raise DataError(f"{what}: expected {n_steps} steps as its metadata says, episode {i} goes beyond them")
            for name, array, dim in (("observations", values, obs_dim), ("actions", episode["actions"], act_dim)):
                rows = (length, length + 1) if name == "observations" else (length,)
                if np.ndim(array) != 2 or len(array) not in rows or array.shape[1] != dim:
                    raise DataError(
                        f"{where}: {name}: expected shape ({' or '.join(map(str, rows))}, {dim}), got {np.shape(array)}"
                    )
            observations[start:stop] = values[:length]
            actions[start:stop] = episode["actions"]
            check_finite(observations[start:stop], f"{where}: observations")
            check_actions(actions[start:stop], low, high, f"{where}: actions")
            check_finite(episode["rewards"], f"{where}: rewards")
            cu_seqlens[i + 1] = stop
            returns[i] = sum_in_order(episode["rewards"])
            if rewards is not None:
                rewards[start:stop] = episode["rewards"]
            complete[i] = bool(episode["terminations"][-1] or episode["truncations"][-1])
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"{what} is damaged and cannot be read: {error}") from error
    if cu_seqlens[-1] != n_steps:
        raise DataError(f"{what}: expected {n_steps} steps as its metadata says, found {cu_seqlens[-1]}")

    warn_of_cuts(complete, what, "neither terminated nor truncated")
    spec = dataset.env_spec
    env_id = spec.id if spec is not None else None
    return Trajectories(observations, actions, cu_seqlens, returns, complete, low, high, env_id, rewards)


def _open(dataset_id: str, download: bool) -> Any:
    try:
        import minari
    except ImportError as error:
        raise DataError(f"reading the Minari dataset {dataset_id!r} needs the package minari: {error}") from None
    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError:
        # No id to ask the hub for.
        if Path(dataset_id).is_dir():
            raise DataError(f"{dataset_id}: expected an HDF5 file or a Minari id, found a folder") from None
    except Exception as error:
        raise DataError(f"Minari dataset {dataset_id!r} is damaged and cannot be read: {error}") from error

    reason = "download is switched off"
    if download:
        try:
            return minari.load_dataset(dataset_id, download=True)
        # Without a network this fails in the hub's client, in the network library below it, or in Minari.
        except Exception as error:
            reason = f"downloading it failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    local = list(minari.list_local_datasets())
    close = difflib.get_close_matches(dataset_id, local, n=3, cutoff=0.3) or local[:3]
    hint = f"closest local ids: {', '.join(close)}" if close else "there are no local datasets"
    raise DataError(f"Minari dataset {dataset_id!r} is not installed, and {reason}; {hint}")


def _observation_space(dataset: Any, key: str | None, what: str) -> Any:
    from gymnasium import spaces

    space = dataset.observation_space
    if isinstance(space, spaces.Dict):
        keys = ", ".join(repr(name) for name in space.spaces)
        if key is None:
            raise DataError(
                f"{what}: observations are dictionaries of {keys}: expected observation_key to name the one to use"
            )
        if key not in space.spaces:
            raise DataError(f"{what}: observation_key: expected one of {keys}, got {key!r}")
        return space.spaces[key]
    if key is not None:
        raise DataError(f"{what}: observation_key={key!r} was given, but observations are not dictionaries")
    return space


def _flat_dim(space: Any, what: str) -> int:
    from gymnasium import spaces

    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise DataError(f"{what}: expected a one-dimensional Box, got {space}")
    return int(space.shape[0])
