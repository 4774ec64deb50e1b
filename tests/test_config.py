"""Configuration: every bound is checked by name, dicts round-trip, presets and replaced fields."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gac_fast.config import PRESETS, Config, ModelConfig, PlanConfig, PosteriorConfig, TrainConfig, preset
from gac_fast.errors import ConfigError

BAD = [
    (ModelConfig, {"dim": 0}, "model.dim must be at least 1, got 0"),
    (ModelConfig, {"n_layers": 0}, "model.n_layers must be at least 1, got 0"),
    (ModelConfig, {"window": 0}, "model.window must be at least 1, got 0"),
    (ModelConfig, {"n_z": 0}, "model.n_z must be at least 1, got 0"),
    (ModelConfig, {"return_ensemble": 0}, "model.return_ensemble must be at least 1, got 0"),
    (ModelConfig, {"dim": 130}, "model.dim must be a multiple of model.n_heads = 4, got 130"),
    (ModelConfig, {"dim": 36}, "model.dim / model.n_heads must be even and within 8..256, got 9"),
    (ModelConfig, {"dim": 24}, "model.dim / model.n_heads must be even and within 8..256, got 6"),
    (ModelConfig, {"dim": 2048}, "model.dim / model.n_heads must be even and within 8..256, got 512"),
    (ModelConfig, {"return_dropout": 1.0}, r"model.return_dropout must be in \[0, 1\), got 1.0"),
    (ModelConfig, {"action_token_dropout": -0.1}, r"model.action_token_dropout must be in \[0, 1\), got -0.1"),
    (ModelConfig, {"rope_base": 1.0}, "model.rope_base must be greater than 1, got 1.0"),
    (ModelConfig, {"context": "actions"}, "model.context must be states or states_actions, got 'actions'"),
    (ModelConfig, {"prior": "unet"}, "model.prior must be mlp or identity, got 'unet'"),
    (ModelConfig, {"return_context": "all"}, "model.return_context must be none or first_state, got 'all'"),
    (
        ModelConfig,
        {"context": "states", "action_token_dropout": 0.5},
        "model.action_token_dropout must be 0 where model.context = 'states', got 0.5",
    ),
    (PosteriorConfig, {"method": "mcmc"}, "posterior.method must be langevin or variational, got 'mcmc'"),
    (PosteriorConfig, {"n_steps": 0}, "posterior.n_steps must be at least 1, got 0"),
    (PosteriorConfig, {"step_size": 0.0}, "posterior.step_size must be greater than 0, got 0.0"),
    (PosteriorConfig, {"max_drift_ratio": -1.0}, "posterior.max_drift_ratio must be greater than 0"),
    (PosteriorConfig, {"action_temperature": 0.0}, "posterior.action_temperature must be greater than 0"),
    (
        PosteriorConfig,
        {"return_temperature": float("nan")},
        "posterior.return_temperature must be greater than 0, got nan",
    ),
    (PosteriorConfig, {"learning_rate": 0.0}, "posterior.learning_rate must be greater than 0"),
    (PosteriorConfig, {"tau_only_fraction": 1.0}, r"posterior.tau_only_fraction must be in \[0, 1\)"),
    (PlanConfig, {"n_steps": -1}, "plan.n_steps must be at least 0, got -1"),
    (PlanConfig, {"step_size": 0.0}, "plan.step_size must be greater than 0"),
    (PlanConfig, {"radius": 0.0}, "plan.radius must be greater than 0"),
    (PlanConfig, {"max_norm": -1.0}, "plan.max_norm must be greater than 0"),
    (PlanConfig, {"explore_step_size": 0.0}, "plan.explore_step_size must be greater than 0"),
    (PlanConfig, {"kappa": -0.1}, "plan.kappa must be at least 0"),
    (PlanConfig, {"prior_weight": -0.1}, "plan.prior_weight must be at least 0"),
    (PlanConfig, {"n_refine": 0}, "plan.n_refine must be at least 1, got 0"),
    (PlanConfig, {"n_best": -1}, "plan.n_best and plan.n_prior must be at least 0"),
    (PlanConfig, {"n_best": 0, "n_prior": 0}, r"plan.n_best \+ plan.n_prior must be at least 1, got 0"),
    (TrainConfig, {"n_updates": 0}, "train.n_updates must be at least 1, got 0"),
    (TrainConfig, {"batch_size": 0}, "train.batch_size must be at least 1"),
    (TrainConfig, {"keep_checkpoints": 0}, "train.keep_checkpoints must be at least 1"),
    (TrainConfig, {"learning_rate": float("nan")}, "train.learning_rate must be greater than 0, got nan"),
    (TrainConfig, {"grad_clip": 0.0}, "train.grad_clip must be greater than 0"),
    (TrainConfig, {"warmup": -1}, "train.warmup must be at least 0"),
    (TrainConfig, {"held_out": 1.0}, r"train.held_out must be in \[0, 1\), got 1.0"),
    (TrainConfig, {"final_lr_ratio": 1.5}, r"train.final_lr_ratio must be in \[0, 1\], got 1.5"),
    (TrainConfig, {"bf16": "yes"}, "train.bf16 must be off, on or auto, got 'yes'"),
    (TrainConfig, {"compile": "yes"}, "train.compile must be off or on, got 'yes'"),
    (TrainConfig, {"cuda_graph": "yes"}, "train.cuda_graph must be off, on or auto, got 'yes'"),
    (TrainConfig, {"sampling": "random"}, "train.sampling must be length or uniform, got 'random'"),
    (TrainConfig, {"seed": -1}, r"train.seed must be in \[0, 2\^32\), got -1"),
    (ModelConfig, {"rope_base": float("inf")}, "model.rope_base must be finite, got inf"),
    (PosteriorConfig, {"step_size": float("inf")}, "posterior.step_size must be finite, got inf"),
    (PlanConfig, {"kappa": float("inf")}, "plan.kappa must be finite, got inf"),
    (TrainConfig, {"learning_rate": float("inf")}, "train.learning_rate must be finite, got inf"),
]


@pytest.mark.parametrize(("section", "fields", "message"), BAD, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_value_out_of_bounds_is_named(section, fields, message):
    with pytest.raises(ConfigError, match=message):
        section(**fields)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name):
    config = preset(name)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"preset 'huge' is unknown; expected one of gym, .*pointmaze"):
        preset("huge")


def test_unknown_sections_and_fields_are_named():
    with pytest.raises(ConfigError, match="config section 'modle' is unknown; expected model, posterior, plan, train"):
        Config.from_dict({"modle": {}})
    with pytest.raises(ConfigError, match=r"config field model.width is unknown; expected one of action_token_dropout"):
        Config.from_dict({"model": {"width": 3}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"seed": "x"}}, "train.seed must be an integer, got 'x'"),
        ({"train": {"n_updates": "20"}}, "train.n_updates must be an integer, got '20'"),
        ({"train": {"n_updates": 2.5}}, "train.n_updates must be an integer, got 2.5"),
        ({"train": {"n_updates": True}}, "train.n_updates must be an integer, got True"),
        ({"train": {"n_updates": None}}, "train.n_updates must be an integer, got None"),
        ({"model": {"rope_base": "10"}}, "model.rope_base must be a number, got '10'"),
        ({"plan": {"kappa": False}}, "plan.kappa must be a number, got False"),
        ({"posterior": {"method": 3}}, "posterior.method must be a string, got 3"),
        ({"train": {"device": ["cpu"]}}, r"train.device must be a string, got \['cpu'\]"),
        ({"train": 3}, "config section 'train' must be a mapping of fields, got 3"),
        ({"plan": None}, "config section 'plan' must be a mapping of fields, got None"),
        ([], r"config must be a mapping of sections, got \[\]"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_dict(values)


def test_an_integer_may_stand_for_a_number():
    assert Config.from_dict({"plan": {"kappa": 2}}).plan.kappa == 2


def test_what_is_missing_has_its_default():
    assert Config.from_dict({"train": {"seed": 3}}) == Config(train=TrainConfig(seed=3))


def test_replace_changes_the_given_fields_alone():
    config = preset("tiny")
    changed = config.replace(train={"seed": 5}, model={"n_z": 3})
    assert (changed.train.seed, changed.model.n_z) == (5, 3)
    assert changed.replace(train={"seed": config.train.seed}, model={"n_z": config.model.n_z}) == config
    with pytest.raises(ConfigError, match=r"config field train.speed is unknown"):
        config.replace(train={"speed": 1})
    with pytest.raises(ConfigError, match=r"train.batch_size must be at least 1"):
        config.replace(train={"batch_size": 0})


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").train.seed = 4


def test_tokens_per_step_follow_the_context():
    assert ModelConfig(context="states").tokens_per_step == 1
    assert ModelConfig(context="states_actions").tokens_per_step == 2


def test_every_field_is_documented():
    """The text under a field is its help on the command line."""
    import ast
    from pathlib import Path

    from gac_fast import config

    tree = ast.parse(Path(config.__file__).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    assert len(classes) >= 5
    for node in classes:
        if node.name == "Config":
            continue
        for this, after in zip(node.body[:-1], node.body[1:], strict=True):
            if isinstance(this, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{this.target.id}"


def test_segments_need_a_start_and_new_plans_need_segments():
    model = {"return_context": "first_state"}
    config = Config().replace(model=model, train={"segment": 8}, plan={"replan_every": 8})
    with pytest.raises(ConfigError, match=r"train\.segment must be 0 where .* = 'none' and .* got 8"):
        config.replace(model={"return_context": "none"})
    with pytest.raises(ConfigError, match=r"plan\.replan_every must be 0 where train\.segment = 0, .* got 8"):
        config.replace(train={"segment": 0})
    # Baselines have no return model, and plan nothing.
    config.replace(model={"return_context": "none"}, baseline={"method": "bc"})
