"""Whole episodes out of a vector environment and an actor, in packed storage."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from gac_fast.errors import DataError, EnvError

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from gac_fast.data import Trajectories

__all__ = ["Acts", "MakeActor", "Rollout", "rollout"]

# Rows are seeded with consecutive numbers from the round's own; all of them stay below this, which any generator takes.
SEED_LIMIT = 2**31

# Seconds that a step or reset may take. The slowest reset of the supported environments takes a second.
TIMEOUT = 60.0

# Time steps of a round that the buffers of kept episodes hold at first; they double.
FIRST_STEPS = 256


class Acts(Protocol):
    """Whatever chooses the actions of a round: a :class:`gac_fast.act.Actor`, or anything else with this method.

    Two more are used where they exist: ``z0``, the plan seeds [num_envs, n_z, D], which the rollout keeps beside the
    episodes; and ``split(sizes)``, which gives one actor for each of several groups of consecutive rows, so that one
    group can act while another is stepped.
    """

    def act(self, obs: np.ndarray, /) -> np.ndarray:
        """Observations float32 [num_envs, obs_dim] -> actions [num_envs, act_dim], both in environment units.

        The array of observations is written to again for the next step.
        """
        ...


MakeActor = Callable[[np.ndarray, int], Acts]
"""(first observations [num_envs, obs_dim] in environment units, number of the round's first episode) -> actor."""


@dataclass
class Rollout:
    """n finished episodes, in the order of round and environment; the first ``n_kept`` with all of their steps.

    Steps are packed: those of the kept episodes end to end, N in all.
    """

    returns: np.ndarray
    """float64 [n], sums of rewards in step order."""
    lengths: np.ndarray
    """int64 [n], steps."""
    terminated: np.ndarray
    """bool [n], ended by the environment and not by its time limit."""
    first_observations: np.ndarray
    """float32 [n, obs_dim]."""
    z0: np.ndarray | None = None
    """float32 [n, n_z, D], the plan seeds that acted; None where an actor had none."""
    n_kept: int = 0
    """Episodes whose steps are kept."""
    packed_observations: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """float32 [N, obs_dim]."""
    packed_actions: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """float32 [N, act_dim]."""

    @property
    def cu_seqlens(self) -> npt.NDArray[np.int64]:
        """[n_kept + 1], first packed row of each kept episode, and N."""
        return np.concatenate(([0], np.cumsum(self.lengths[: self.n_kept]))).astype(np.int64)

    @property
    def observations(self) -> list[np.ndarray]:
        """Per kept episode float32 [H, obs_dim], views."""
        return np.split(self.packed_observations, self.cu_seqlens[1:-1]) if self.n_kept else []

    @property
    def actions(self) -> list[np.ndarray]:
        """Per kept episode float32 [H, act_dim], views."""
        return np.split(self.packed_actions, self.cu_seqlens[1:-1]) if self.n_kept else []

    def trajectories(self, env: VectorEnv[Any, Any, Any], env_id: str | None = None) -> Trajectories:
        """The kept episodes as packed storage, and they alone; the steps are not copied.

        Args:
            env: whose action bounds they have: the vector environment or any part of it.

        Raises:
            DataError: no episode was kept.
        """
        from gac_fast.data import Trajectories

        n = self.n_kept
        if n == 0:
            raise DataError(f"trajectories: expected at least 1 kept episode, got 0 of {len(self.returns)}: set keep")
        space = env.single_action_space
        return Trajectories(
            observations=self.packed_observations,
            actions=self.packed_actions,
            cu_seqlens=self.cu_seqlens,
            returns=self.returns[:n],
            complete=np.ones(n, np.bool_),
            action_low=np.asarray(space.low, np.float32),  # type: ignore[attr-defined]
            action_high=np.asarray(space.high, np.float32),  # type: ignore[attr-defined]
            env_id=env_id,
        )


def rollout(
    env: VectorEnv[Any, Any, Any] | Sequence[VectorEnv[Any, Any, Any]],
    make_actor: MakeActor,
    episodes: int,
    seed: int | None = None,
    keep: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    timeout: float | None = TIMEOUT,
) -> Rollout:
    """Run ``episodes`` whole episodes in rounds of one episode per environment.

    A round ends when its last episode does; what an environment that finished earlier does meanwhile is discarded, so
    that short episodes are not over-represented. Any autoreset mode will do.

    Several vectors are run as one: their rows are numbered through, plans and actors are made for all of them at once,
    and while one vector is stepped, in a thread or in processes of its own, the actor's part for the next one acts.
    Given the same seeds and plans, results are those of one vector of all rows, to the rounding of an actor whose sums
    depend on how many rows it is given. (An actor without ``split`` acts for all rows at once, after all have stepped.)

    Args:
        env: any ``gymnasium.vector.VectorEnv`` with flat float observations and a Box action space, or a sequence of
            such: two halves, as :func:`gac_fast.envs.make_halves` makes them.
        make_actor: called at the start of every round.
        seed: round r resets with ``seed + r * num_envs``, to which vector environments add the row: no start is seeded
            twice. Seeds stay below 2^31 and begin again at 0 there.
        keep: episodes, from the first, whose observations and actions are kept.
        on_step: called with (episodes finished, time steps made) after every step of a vector.
        timeout: seconds that a step or a reset may take. None waits for ever, and steps a single vector in the calling
            thread: for simulators that must stay in it.

    Raises:
        EnvError: an observation or reward is not finite, or an environment raised, died or did not answer in time. Its
            ``environment`` and ``step`` say where, and its ``finished`` holds the episodes that were finished before,
            those of the broken round included. What has crashed or hangs cannot be used further; close it.
    """
    if episodes < 1:
        raise EnvError(f"episodes: expected at least 1, got {episodes}")
    if timeout is not None and not timeout > 0:
        raise EnvError(f"timeout: expected more than 0 seconds, got {timeout}")
    run = _Run(list(env) if isinstance(env, Sequence) else [env], episodes, keep, on_step, timeout)
    try:
        while run.finished.n < episodes:
            run.round(make_actor, seed)
    finally:
        run.close()
    return run.finished.rollout()


class _Grows:
    """Rows that are appended to, in one array with room to spare."""

    def __init__(self) -> None:
        self._array: np.ndarray | None = None
        self._n = 0

    def append(self, rows: np.ndarray) -> None:
        n = self._n + len(rows)
        if self._array is None:
            self._array = np.empty((max(n, 1), *rows.shape[1:]), rows.dtype)
        elif n > len(self._array):
            grown = np.empty((max(n, 2 * len(self._array)), *self._array.shape[1:]), self._array.dtype)
            grown[: self._n] = self._array[: self._n]
            self._array = grown
        self._array[self._n : n] = rows
        self._n = n

    def rows(self) -> np.ndarray | None:
        """What has been appended; a view. None before the first."""
        return None if self._array is None else self._array[: self._n]


class _Finished:
    """The episodes of the rounds that are over."""

    def __init__(self, obs_dim: int, act_dim: int) -> None:
        self.n = 0
        self.n_kept = 0
        self._dims = (obs_dim, act_dim)
        self._columns: dict[str, _Grows] = {}
        self._has_seeds = True

    def add(self, n_kept: int, z0: np.ndarray | None, **columns: np.ndarray) -> None:
        """Append columns of [n, ...] or, where packed, of as many rows as there are steps."""
        self._has_seeds &= z0 is not None
        if self._has_seeds and z0 is not None:
            columns["z0"] = z0
        for name, rows in columns.items():
            self._columns.setdefault(name, _Grows()).append(rows)
        self.n += len(columns["returns"])
        self.n_kept += n_kept

    def keep(self, observations: np.ndarray, actions: np.ndarray) -> None:
        """Append the steps of one episode."""
        self._columns.setdefault("packed_observations", _Grows()).append(observations)
        self._columns.setdefault("packed_actions", _Grows()).append(actions)

    def rollout(self) -> Rollout:
        arrays = {name: grows.rows() for name, grows in self._columns.items()}
        if not self._has_seeds:
            arrays.pop("z0", None)
        for name, dim in zip(("packed_observations", "packed_actions"), self._dims, strict=True):
            arrays.setdefault(name, np.empty((0, dim), np.float32))
        return Rollout(n_kept=self.n_kept, **arrays)  # type: ignore[arg-type]


class _Steps:
    """Observations and actions of the first rows of a round by time step, [T, n, ...], in buffers that double."""

    def __init__(self, n: int, obs_dim: int, act_dim: int) -> None:
        self._n = n
        self._observations = np.empty((FIRST_STEPS, n, obs_dim), np.float32)
        self._actions = np.empty((FIRST_STEPS, n, act_dim), np.float32)

    def write(self, t: int, first: int, observations: np.ndarray, actions: np.ndarray) -> None:
        """Step ``t`` of the rows from ``first`` on; rows beyond those that are kept are left out."""
        if t >= len(self._observations):
            self._observations, self._actions = (
                np.concatenate((x, np.empty_like(x))) for x in (self._observations, self._actions)
            )
        rows = slice(first, min(first + len(observations), self._n))
        self._observations[t, rows] = observations[: rows.stop - first]
        self._actions[t, rows] = actions[: rows.stop - first]

    def episode(self, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        return self._observations[:length, row], self._actions[:length, row]


class _Part:
    """One of the vectors, with what is under way in it; its rows are ``rows`` of the whole."""

    def __init__(self, env: VectorEnv[Any, Any, Any], first: int, runner: _Runner) -> None:
        from gymnasium.vector import AutoresetMode

        self.env = env
        self.rows = slice(first, first + env.num_envs)
        self.disabled = env.metadata.get("autoreset_mode") == AutoresetMode.DISABLED
        self.ended: npt.NDArray[np.bool_] | None = None
        """Rows to reset before the next step, where the environment does not do so itself."""
        self.t = 0
        """Steps of the present round, the one under way included."""
        self.pending = False
        self._runner = runner

    def reset(self, seed: int | None) -> None:
        """Begin the reset of all rows."""
        self.t, self.ended, self.pending = 0, None, True
        self._runner.reset(seed)

    def step(self, actions: np.ndarray) -> None:
        """Begin a step."""
        mask, self.ended = self.ended, None
        self.t += 1
        self.pending = True
        self._runner.step(actions, mask)

    def wait(self, timeout: float | None) -> Any:
        """The result of what was begun."""
        result = self._runner.wait(timeout)
        self.pending = False
        return result

    def failed_row(self, error: BaseException) -> int | None:
        """Which row of the whole it was; None where that cannot be told."""
        row = getattr(error, "environment", None)
        if row is None and isinstance(error, TimeoutError):
            row = self._runner.hung_row()
        elif row is None:
            row = _row_in_traceback(error)
            row = _row_of_processes(self.env) if row is None else row
        return None if row is None else self.rows.start + row

    def close(self, timeout: float | None) -> None:
        self._runner.close(self.pending, timeout)


class _Runner(Protocol):
    """How a vector is stepped: one call begins, another waits."""

    def reset(self, seed: int | None) -> None: ...

    def step(self, actions: np.ndarray, mask: npt.NDArray[np.bool_] | None) -> None:
        """Reset the rows of ``mask``, then step."""

    def wait(self, timeout: float | None) -> Any:
        """The result, or the environment's own error; TimeoutError after ``timeout`` seconds."""

    def hung_row(self) -> int | None:
        """The row that does not answer, where that can be told."""

    def close(self, pending: bool, timeout: float | None) -> None: ...


def _reset_and_step(env: VectorEnv[Any, Any, Any], actions: np.ndarray, mask: npt.NDArray[np.bool_] | None) -> Any:
    if mask is not None:
        env.reset(options={"reset_mask": mask})
    return env.step(actions)


class _Direct:
    """Steps a vector in the calling thread, while it waits."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self._env = env
        self._job: Callable[[], Any] = lambda: None

    def reset(self, seed: int | None) -> None:
        self._job = lambda: self._env.reset(seed=seed)

    def step(self, actions: np.ndarray, mask: npt.NDArray[np.bool_] | None) -> None:
        self._job = lambda: _reset_and_step(self._env, actions, mask)

    def wait(self, timeout: float | None) -> Any:
        return self._job()

    def hung_row(self) -> int | None:
        return None

    def close(self, pending: bool, timeout: float | None) -> None:
        pass


class _Thread:
    """Steps a vector in a thread, which ends with the rollout.

    It is a daemon: a simulator that never returns cannot be stopped, but must not keep the program from ending.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self._env = env
        self._jobs: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._hangs = False
        self._thread = threading.Thread(target=self._work, name="gac_fast rollout", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._results.put((job(), None))
            except BaseException as error:
                self._results.put((None, error))

    def reset(self, seed: int | None) -> None:
        self._jobs.put(lambda: self._env.reset(seed=seed))

    def step(self, actions: np.ndarray, mask: npt.NDArray[np.bool_] | None) -> None:
        self._jobs.put(lambda: _reset_and_step(self._env, actions, mask))

    def wait(self, timeout: float | None) -> Any:
        try:
            result, error = self._results.get(timeout=timeout)
        except queue.Empty:
            self._hangs = True
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        if error is not None:
            raise error
        return result

    def hung_row(self) -> int | None:
        return None

    def close(self, pending: bool, timeout: float | None) -> None:
        self._jobs.put(None)
        if not self._hangs:
            self._thread.join(timeout)


class _Processes:
    """Steps an ``AsyncVectorEnv``, whose processes work while nobody waits: a thread would be one too many."""

    def __init__(self, env: Any) -> None:
        self._env = env
        self._mask: npt.NDArray[np.bool_] | None = None
        self._actions: np.ndarray | None = None

    def reset(self, seed: int | None) -> None:
        self._actions = None
        self._env.reset_async(seed=seed)

    def step(self, actions: np.ndarray, mask: npt.NDArray[np.bool_] | None) -> None:
        self._actions, self._mask = actions, mask
        if mask is None:
            self._env.step_async(actions)
        else:
            self._env.reset_async(options={"reset_mask": mask})

    def wait(self, timeout: float | None) -> Any:
        import multiprocessing

        try:
            if self._actions is not None and self._mask is not None:
                self._env.reset_wait(timeout)
                self._mask = None
                self._env.step_async(self._actions)
            return self._env.reset_wait(timeout) if self._actions is None else self._env.step_wait(timeout)
        except multiprocessing.TimeoutError:
            raise TimeoutError(f"no answer within {timeout:g} s") from None

    def hung_row(self) -> int | None:
        pipes = enumerate(self._env.parent_pipes)
        return next((row for row, pipe in pipes if pipe is not None and not pipe.closed and not pipe.poll()), None)

    def close(self, pending: bool, timeout: float | None) -> None:
        if pending:
            # So that a vector that is well can be used again.
            with contextlib.suppress(Exception):
                self.wait(timeout)


def _row_in_traceback(error: BaseException) -> int | None:
    """The row at which a ``SyncVectorEnv`` was, which its errors do not say."""
    from gymnasium.vector import SyncVectorEnv

    traceback = error.__traceback__
    while traceback is not None:
        variables = traceback.tb_frame.f_locals
        if isinstance(variables.get("self"), SyncVectorEnv) and isinstance(variables.get("i"), int):
            return int(variables["i"])
        traceback = traceback.tb_next
    return None


def _row_of_processes(env: VectorEnv[Any, Any, Any]) -> int | None:
    """The row of an ``AsyncVectorEnv`` that reported an error or died."""
    from gymnasium.vector import AsyncVectorEnv

    base = env.unwrapped
    if not isinstance(base, AsyncVectorEnv):
        return None
    pipes: list[Any] = list(base.parent_pipes)
    if None in pipes:
        return pipes.index(None)
    # A process that is being killed closes its pipe a moment before it is gone.
    multiprocessing.connection.wait([process.sentinel for process in base.processes], timeout=1.0)
    return next((row for row, process in enumerate(base.processes) if not process.is_alive()), None)


@dataclass
class _Unit:
    """An actor and the parts it acts for, which are neighbours."""

    actor: Acts
    parts: list[_Part]

    @property
    def rows(self) -> slice:
        return slice(self.parts[0].rows.start, self.parts[-1].rows.stop)


class _Run:
    """One call of :func:`rollout`. Arrays of a round are [num_envs, ...] over the rows of all vectors."""

    def __init__(
        self,
        envs: list[VectorEnv[Any, Any, Any]],
        episodes: int,
        keep: int,
        on_step: Callable[[int, int], None] | None,
        timeout: float | None,
    ) -> None:
        self.episodes, self.keep, self.on_step, self.timeout = episodes, keep, on_step, timeout
        self.obs_dim, self.act_dim = _checked_dims(envs)
        self.n = sum(env.num_envs for env in envs)
        self.finished = _Finished(self.obs_dim, self.act_dim)
        self.obs = np.zeros((self.n, self.obs_dim), np.float32)
        self.pinned: Any = None
        self.steps_made, self.round_index = 0, 0
        firsts = np.cumsum([0, *(env.num_envs for env in envs)])
        alone = len(envs) == 1
        self.parts = [
            _Part(env, int(first), _runner(env, timeout, alone)) for env, first in zip(envs, firsts[:-1], strict=True)
        ]

    def close(self) -> None:
        for part in self.parts:
            part.close(self.timeout)

    def round(self, make_actor: MakeActor, seed: int | None) -> None:
        """One episode in every environment, or in as many as are still wanted."""
        n, start = self.n, self.finished.n
        self.wanted = min(n, self.episodes - start)
        self.running = np.arange(n) < self.wanted
        self.total, self.length = np.zeros(n), np.zeros(n, np.int64)
        self.terminated = np.zeros(n, np.bool_)
        self.n_keep = max(0, min(self.wanted, self.keep - start))
        self.steps = _Steps(self.n_keep, self.obs_dim, self.act_dim)
        first_seed = None if seed is None else _round_seed(seed, self.round_index, n)
        for part in self.parts:
            with self._failures_of(part):
                part.reset(None if first_seed is None else first_seed + part.rows.start)
        for part in self.parts:
            with self._failures_of(part):
                observations, _ = part.wait(self.timeout)
            self._observe(part, observations)
        self.firsts = self.obs.copy()
        actor = make_actor(self.firsts.copy(), start)
        self.z0 = _seeds(actor)
        self._pin(actor)
        units = self._units(actor)
        for unit in units:
            self._begin(unit)
        while units:
            for unit in units:
                for part in unit.parts:
                    if part.pending:
                        self._end(part)
                if self.running[unit.rows].any():
                    self._begin(unit)
            units = [unit for unit in units if any(part.pending for part in unit.parts)]
        self._store(np.arange(self.wanted))
        self.round_index += 1

    def _units(self, actor: Acts) -> list[_Unit]:
        if len(self.parts) == 1 or not hasattr(actor, "split"):
            units = [_Unit(actor, self.parts)]
        else:
            actors = actor.split([part.env.num_envs for part in self.parts])
            units = [_Unit(one, [part]) for one, part in zip(actors, self.parts, strict=True)]
        return [unit for unit in units if self.running[unit.rows].any()]

    def _begin(self, unit: _Unit) -> None:
        """Act, and begin the steps."""
        actions = np.asarray(unit.actor.act(self.obs[unit.rows]))
        for part in unit.parts:
            running = self.running[part.rows]
            if not running.any():
                continue
            own = slice(part.rows.start - unit.rows.start, part.rows.stop - unit.rows.start)
            lost = running & ~np.isfinite(actions[own]).all(axis=1)
            if lost.any():
                row = part.rows.start + int(lost.argmax())
                self._fail(part, row, f"the actor's action for environment {row} is not finite", part.t + 1)
            if part.rows.start < self.n_keep:
                self.steps.write(part.t, part.rows.start, self.obs[part.rows], actions[own])
            with self._failures_of(part):
                part.step(actions[own])

    def _end(self, part: _Part) -> None:
        """Wait for a step and book it."""
        with self._failures_of(part):
            observations, reward, termination, truncation, _ = part.wait(self.timeout)
        rows = part.rows
        running = self.running[rows]
        self._observe(part, observations)
        reward = np.asarray(reward, np.float64)
        lost = running & ~np.isfinite(reward)
        if lost.any():
            row = rows.start + int(lost.argmax())
            self._fail(part, row, f"environment {row} returned a non-finite reward")
        total = self.total[rows]
        np.add(total, reward, out=total, where=running)
        self.length[rows] += running
        self.steps_made += int(np.count_nonzero(running))
        termination = np.asarray(termination, np.bool_)
        done = termination | np.asarray(truncation, np.bool_)
        self.terminated[rows] |= running & termination
        running &= ~done
        if part.disabled and done.any():
            part.ended = done
        if self.on_step is not None:
            self.on_step(self.finished.n + self._n_ended(), self.steps_made)

    def _observe(self, part: _Part, observations: np.ndarray) -> None:
        """Take over what was observed; what environments observe that are not running may be anything."""
        own, running = self.obs[part.rows], self.running[part.rows]
        own[...] = observations
        finite = np.isfinite(own)
        if finite.all():
            return
        lost = running & ~finite.all(axis=1)
        if lost.any():
            row = part.rows.start + int(lost.argmax())
            self._fail(part, row, f"environment {row} returned a non-finite observation")
        own[~finite] = 0.0

    def _pin(self, actor: Acts) -> None:
        """Observations for an actor on a GPU lie in memory that it can read without the host's help."""
        device = getattr(actor, "device", None)
        if self.pinned is None and getattr(device, "type", None) == "cuda":
            import torch

            self.pinned = torch.from_numpy(self.obs).pin_memory()
            self.obs = self.pinned.numpy()

    def _n_ended(self) -> int:
        return self.wanted - int(np.count_nonzero(self.running))

    def _store(self, rows: npt.NDArray[np.int64]) -> None:
        """Add the episodes of these rows, in ascending order, to the finished ones."""
        kept = rows[rows < self.n_keep]
        for row in kept:
            self.finished.keep(*self.steps.episode(row, self.length[row]))
        self.finished.add(
            len(kept),
            None if self.z0 is None else self.z0[rows],
            returns=self.total[rows],
            lengths=self.length[rows],
            terminated=self.terminated[rows],
            first_observations=self.firsts[rows],
        )

    @contextlib.contextmanager
    def _failures_of(self, part: _Part) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            row = part.failed_row(error)
            if row is not None:
                where = f"environment {row}"
            elif len(self.parts) == 1:
                where = "the environment"
            else:
                where = f"one of the environments {part.rows.start} to {part.rows.stop - 1}"
            what = f"{type(error).__name__}: {error}" if isinstance(error, EOFError | OSError) else str(error)
            self._fail(part, row, f"{where} failed", cause=error, detail=f": {what}")

    def _fail(
        self,
        part: _Part,
        row: int | None,
        what: str,
        step: int | None = None,
        cause: BaseException | None = None,
        detail: str = "",
    ) -> NoReturn:
        """Raise, with the episodes that are finished."""
        step = part.t if step is None else step
        ended = np.flatnonzero(~self.running[: self.wanted])
        when = f"at step {step}" if step else "at its reset"
        error = EnvError(f"{what} {when}, {self.finished.n + len(ended)} episodes done{detail}")
        if len(ended):
            self._store(ended)
        error.environment, error.step = row, step
        error.finished = self.finished.rollout() if self.finished.n else None
        raise error from cause


def _runner(env: VectorEnv[Any, Any, Any], timeout: float | None, alone: bool) -> _Runner:
    from gymnasium.vector import AsyncVectorEnv

    if isinstance(env, AsyncVectorEnv):
        return _Processes(env)
    return _Direct(env) if alone and timeout is None else _Thread(env)


def _checked_dims(envs: list[VectorEnv[Any, Any, Any]]) -> tuple[int, int]:
    """(obs_dim, act_dim) of vectors that can be run as one."""
    if not envs:
        raise EnvError("env: expected at least one vector environment, got none")
    shapes = [(env.single_observation_space.shape, env.single_action_space.shape) for env in envs]
    if any(one != shapes[0] for one in shapes):
        raise EnvError(f"env: expected spaces of the same shapes in all vectors, got {shapes}")
    if len({id(env) for env in envs}) < len(envs):
        raise EnvError("env: expected different vectors, got one of them twice")
    for name, shape in zip(("observations", "actions"), shapes[0], strict=True):
        if shape is None or len(shape) != 1:
            raise EnvError(f"env: expected flat {name}, got shape {shape}")
    (obs_dim,), (act_dim,) = shapes[0]  # type: ignore[misc]
    return obs_dim, act_dim


def _seeds(actor: Acts) -> np.ndarray | None:
    """Plan seeds of an actor, float32 [num_envs, n_z, D]; a copy."""
    z0 = getattr(actor, "z0", None)
    if z0 is None:
        return None
    if not isinstance(z0, np.ndarray):
        z0 = z0.detach().cpu().numpy()
    return np.array(z0, np.float32)


def _round_seed(seed: int, round_index: int, num_envs: int) -> int:
    return int(seed + round_index * num_envs) % (SEED_LIMIT - num_envs)
