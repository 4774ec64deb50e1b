"""Real MuJoCo episodes in, a policy out, real MuJoCo episodes back: committed cuts and, where at hand, full files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import gac_fast
from gac_fast.data import load

CUTS = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """MuJoCo writes its warnings to a file in the current folder."""
    monkeypatch.chdir(tmp_path)


def train_and_evaluate(dataset, folder: Path, env: str, preset: str, **train) -> gac_fast.EvalResult:
    config = gac_fast.preset(preset).replace(train={"n_updates": 3, "batch_size": 2, "device": "cpu"} | train)
    run = gac_fast.train(dataset, config, folder, progress=False, tensorboard=False)
    policy = gac_fast.load(run)
    assert policy.step == 3
    assert policy.env_id == env
    return gac_fast.evaluate(policy, env, episodes=3, seed=0, keep=3)


@pytest.mark.parametrize(
    ("file", "env", "act_dim"), [("hopper-medium", "Hopper-v5", 3), ("halfcheetah-medium", "HalfCheetah-v5", 6)]
)
def test_from_d4rl_file_to_scores(file, env, act_dim, tmp_path):
    result = train_and_evaluate(load(CUTS / f"{file}-cut.hdf5"), tmp_path / "run", env, "tiny", held_out=0.0)
    assert len(result.returns) == 3
    assert np.isfinite(result.returns).all()
    assert result.normalized_mean is not None
    assert all(actions.shape[1] == act_dim and np.abs(actions).max() <= 1 for actions in result.rollout.actions)
    if env == "Hopper-v5":
        # A policy of three updates falls.
        assert result.rollout.terminated.all()
        assert result.lengths.max() < 1000
    else:
        assert result.lengths.tolist() == [1000] * 3


@pytest.mark.skipif(
    "GAC_FAST_DATA" not in os.environ, reason="GAC_FAST_DATA does not name the folder of the full files"
)
def test_the_gym_preset_takes_a_full_replay_file(tmp_path):
    dataset = load(Path(os.environ["GAC_FAST_DATA"]) / "hopper-medium-replay.hdf5")
    result = train_and_evaluate(dataset, tmp_path / "run", "Hopper-v5", "gym", held_out=0.002)
    assert np.isfinite(result.returns).all()
    offline = gac_fast.train.log.read_result(gac_fast.train.log.RunDir(tmp_path / "run"))["offline"]
    assert np.isfinite(offline["held_out/nll_per_step"])
