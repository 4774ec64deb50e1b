"""Predicted against achieved return at several numbers of ascent steps: does a longer ascent leave the data?

python benchmarks/ascent.py runs/demo --env pointmaze-umaze
"""

from __future__ import annotations

import argparse

import gac_fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--env", required=True)
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1_000_003)
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 100, 200, 1000])
    arguments = parser.parse_args()
    policy = gac_fast.load(arguments.run)
    print("steps  predicted  achieved  gap/achieved")
    for n_steps in arguments.steps:
        planned = policy.config.replace(plan={"n_steps": n_steps})
        policy.config = planned
        result = gac_fast.evaluate(policy, arguments.env, arguments.episodes, arguments.seed)
        predicted = float(result.predicted.mean())
        gap = abs(predicted - result.mean) / result.mean
        print(f"{n_steps:5d}  {predicted:9.1f}  {result.mean:8.1f}  {gap:12.2f}", flush=True)


if __name__ == "__main__":
    main()
