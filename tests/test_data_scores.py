"""Reference and normalised scores."""

from __future__ import annotations

import numpy as np
import pytest

from gac_fast.data import has_reference_scores, normalized_score, reference_scores
from gac_fast.data.pointmaze import reference_returns
from gac_fast.errors import DataError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Hopper-v5", (-20.272305, 3234.3)),
        ("Hopper-v4", (-20.272305, 3234.3)),
        ("hopper-medium-v2", (-20.272305, 3234.3)),
        ("mujoco/hopper/medium-v0", (-20.272305, 3234.3)),
        ("HalfCheetah-v5", (-280.178953, 12135.0)),
        ("halfcheetah_medium_replay-v2", (-280.178953, 12135.0)),
        ("walker2d", (1.629008, 4592.3)),
        ("maze2d-umaze-v1", (23.85, 161.86)),
        ("maze2d-medium-v1", (13.13, 277.39)),
        ("maze2d-large-v1", (6.7, 273.99)),
        ("maze2d-umaze-dense-v1", (68.537689, 193.66285642381482)),
    ],
)
def test_reference_scores(name: str, expected: tuple[float, float]) -> None:
    assert reference_scores(name) == expected
    assert has_reference_scores(name)


def test_pointmaze_by_any_of_its_names() -> None:
    assert (
        len({reference_scores(f"{p}umaze{s}") for p in ("pointmaze-", "gac_fast/PointMaze-") for s in ("", "-v0")}) == 1
    )


@pytest.mark.parametrize(
    "name",
    ["Ant-v5", "HopperBulletEnv-v0", "dm_control/hopper-hop-v0", "PointMaze_UMaze-v3", "D4RL/pointmaze/umaze-v2"],
)
def test_no_score_is_made_up(name: str) -> None:
    with pytest.raises(DataError, match=rf"'{name}' has no reference scores.*known: .*hopper"):
        normalized_score(name, 1.0)
    assert not has_reference_scores(name)


def test_normalized_score() -> None:
    low, high = reference_scores("Hopper-v5")
    assert normalized_score("Hopper-v5", low) == 0
    assert normalized_score("Hopper-v5", high) == 100
    assert isinstance(normalized_score("Hopper-v5", 1000.0), float)
    returns = np.array([[low, high], [(low + high) / 2, high]])
    np.testing.assert_allclose(normalized_score("Hopper-v5", returns), [[0, 100], [50, 100]])
    assert not has_reference_scores(None)


@pytest.mark.parametrize(("maze", "episodes"), [("umaze", 1024), ("medium", 512), ("large", 256)])
def test_pointmaze_references_can_be_measured_again(maze: str, episodes: int) -> None:
    """Fresh episodes of both policies agree with the constants to 4.5 standard errors."""
    for policy, constant in zip(("random", "controller"), reference_scores(f"pointmaze-{maze}"), strict=True):
        returns = reference_returns(maze, policy, episodes, seed=12345)
        assert abs(returns.mean() - constant) < 4.5 * returns.std() / np.sqrt(episodes)


def test_unknown_reference_policy() -> None:
    with pytest.raises(DataError, match="policy: expected 'random' or 'controller', got 'expert'"):
        reference_returns("umaze", "expert", 1)
