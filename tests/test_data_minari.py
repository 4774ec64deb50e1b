"""Minari datasets by id."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import minari
import numpy as np
import pytest
from data_fixtures import flat_data
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from gac_fast.data import load
from gac_fast.errors import DataError

# Minari advises to fill in author, description and so on.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


@pytest.fixture(autouse=True)
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Minari root of its own for every test."""
    root = tmp_path / "minari"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    return root


def buffer(length: int, seed: int = 0, **changes: Any) -> EpisodeBuffer:
    data = flat_data([length + 1], seed=seed)
    fields = {
        "observations": data["observations"].astype(np.float64),
        "actions": data["actions"][:-1],
        "rewards": data["rewards"][:-1].astype(np.float64),
        "terminations": np.arange(1, length + 1) == length,
        "truncations": np.zeros(length, np.bool_),
    }
    return EpisodeBuffer(**{**fields, **changes})


def create(dataset_id: str, buffers: list[EpisodeBuffer], **options: Any) -> str:
    settings: dict[str, Any] = {
        "observation_space": spaces.Box(-np.inf, np.inf, (3,)),
        "action_space": spaces.Box(-1, 1, (2,)),
        **options,
    }
    minari.create_dataset_from_buffers(dataset_id, buffers, **settings)
    return dataset_id


def test_episodes_come_through(caplog: pytest.LogCaptureFixture) -> None:
    cut = np.zeros(2, np.bool_)
    truncated = np.array([False, False, True])
    buffers = [
        buffer(4, seed=1),
        buffer(3, seed=2, terminations=np.zeros(3, np.bool_), truncations=truncated),
        buffer(2, seed=3, terminations=cut),
    ]
    with caplog.at_level(logging.WARNING):
        trajectories = load(create("mixed-v0", buffers), keep_rewards=True)
    np.testing.assert_array_equal(trajectories.lengths, [4, 3, 2])
    np.testing.assert_array_equal(trajectories.complete, [True, True, False])
    assert "1 of 3 episodes were cut" in caplog.text
    for episode, source in zip(trajectories, buffers, strict=True):
        np.testing.assert_array_equal(episode.observations, np.float32(source.observations)[:-1])
        np.testing.assert_array_equal(episode.actions, source.actions)
        assert episode.episode_return == sum(source.rewards)
    np.testing.assert_array_equal(
        trajectories.rewards, np.float32(np.concatenate([source.rewards for source in buffers]))
    )
    assert load("mixed-v0").rewards is None
    assert trajectories.env_id is None


def test_bounds_and_environment_are_the_datasets() -> None:
    dataset_id = create(
        "pendulum-v0", [buffer(2)], env="Pendulum-v1", action_space=spaces.Box(-2, np.array([1, 3], np.float32))
    )
    trajectories = load(dataset_id)
    assert trajectories.env_id == "Pendulum-v1"
    np.testing.assert_array_equal(trajectories.action_low, [-2, -2])
    np.testing.assert_array_equal(trajectories.action_high, [1, 3])
    with pytest.raises(DataError, match=r"episode 0: actions: expected values from -0\.001 to 0\.001"):
        load(dataset_id, action_bounds=(-0.001, 0.001))


def test_dictionary_observations_need_a_key() -> None:
    space = spaces.Dict({"observation": spaces.Box(-9, 9, (3,)), "goal": spaces.Box(-9, 9, (2,))})
    observations = {"observation": np.ones((5, 3), np.float32), "goal": np.zeros((5, 2), np.float32)}
    dataset_id = create("goals-v0", [buffer(4, observations=observations)], observation_space=space)
    with pytest.raises(DataError, match="dictionaries of 'goal', 'observation': expected observation_key"):
        load(dataset_id)
    with pytest.raises(DataError, match="observation_key: expected one of 'goal', 'observation', got 'goals'"):
        load(dataset_id, observation_key="goals")
    np.testing.assert_array_equal(load(dataset_id, observation_key="observation").observations, np.ones((4, 3)))
    with pytest.raises(DataError, match="observations are not dictionaries"):
        load(create("flat-v0", [buffer(4)]), observation_key="observation")


def _poked(name: str, index: Any, value: float) -> EpisodeBuffer:
    array = np.array(getattr(buffer(3), name), np.float64)
    array[index] = value
    return buffer(3, **{name: array})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (_poked("observations", (1, 2), np.nan), r"episode 1: observations: .* nan at index \[1, 2\]"),
        (
            _poked("actions", (2, 0), 1.5),
            r"episode 1: actions: expected values from -1 to 1, got 1\.5 at index \[2, 0\]",
        ),
        (_poked("rewards", 0, np.inf), r"episode 1: rewards: .* inf at index \[0\]"),
        (
            buffer(3, observations=np.zeros((4, 5))),
            r"episode 1: observations: expected shape \(3 or 4, 3\), got \(4, 5\)",
        ),
        (buffer(3, actions=np.zeros((2, 2))), r"episode 1: actions: expected shape \(3, 2\), got \(2, 2\)"),
    ],
)
def test_bad_episodes_are_named(bad: EpisodeBuffer, message: str) -> None:
    dataset_id = create("bad-v0", [buffer(4), bad])
    with pytest.raises(DataError, match=rf"Minari dataset 'bad-v0': {message}"):
        load(dataset_id)


def test_discrete_actions_are_refused() -> None:
    dataset_id = create("keys-v0", [buffer(2, actions=np.zeros(2, np.int64))], action_space=spaces.Discrete(2))
    with pytest.raises(DataError, match=r"action space: expected a one-dimensional Box, got Discrete\(2\)"):
        load(dataset_id)


def test_an_unknown_id_names_the_closest(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(dataset_id: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("minari.storage.hosting.download_dataset", unreachable)
    with pytest.raises(DataError, match="there are no local datasets"):
        load("walker-v0")
    create("hopper-small-v0", [buffer(2)])
    create("pendulum-v0", [buffer(2)])
    message = r"'hopper-smal-v0' is not installed, and downloading it failed \(ConnectionError: no route to host\)"
    with pytest.raises(DataError, match=message + "; closest local ids: hopper-small-v0"):
        load("hopper-smal-v0")
    with pytest.raises(DataError, match="download is switched off"):
        load("hopper-smal-v0", download=False)


def test_a_missing_dataset_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minari.storage.hosting.download_dataset", lambda name: create(name, [buffer(2), buffer(3)]))
    np.testing.assert_array_equal(load("remote/far-v0").lengths, [2, 3])


def test_a_damaged_dataset(datasets: Path) -> None:
    load(create("broken-v0", [buffer(50), buffer(60)]))
    path = datasets / "broken-v0" / "data" / "main_data.hdf5"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match="Minari dataset 'broken-v0' is damaged and cannot be read"):
        load("broken-v0")


def test_options_are_checked() -> None:
    with pytest.raises(DataError, match=r"options of a Minari dataset \(observation_key, .*\), got horizon"):
        load("any-v0", horizon=3)
