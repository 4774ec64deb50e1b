"""Whole episodes out of a vector environment and an actor, in packed storage."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import multiprocessing.connection
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

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

# More of them for a vector of processes to find out itself which of them hangs.
ASYNC_GRACE = 2.0

# How long the end of a rollout waits for steps that are under way, after an error or Ctrl-C.
CLOSE_SECONDS = 5.0

# Between reports of progress, where parts do not wait for this thread: waking it at every step costs them a tenth.
TELL_SECONDS = 0.05

# Time steps of a round that the buffers of kept episodes hold at first; they double.
FIRST_STEPS = 256


class Acts(Protocol):
    """Whatever chooses the actions of a round: a :class:`gac_fast.act.Actor`, or anything else with this method.

    More is used where it exists: ``z0``, the plan seeds [num_envs, n_z, D], which the rollout keeps beside the
    episodes; ``device``, as observations for a GPU lie in pinned memory; ``split(sizes)``, which gives one actor
    for each of several groups of consecutive rows (these act in threads of their own, one for every vector);
    ``rewarded(rewards)``, told before every further ``act`` what the last actions earned, float64 [num_envs], 0 where
    the episode was over; and ``rest(mask)``, bool [num_envs], told of the rows that have finished, whose actions are of
    no matter from then on.
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
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 [n], round and environment of each: round r's environment i has r * num_envs + i."""
    n_kept: int = 0
    """Episodes whose steps are kept."""
    packed_observations: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """float32 [N, obs_dim]."""
    packed_actions: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """float32 [N, act_dim]."""
    packed_rewards: np.ndarray | None = None
    """float64 [N], where they were asked for."""

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
    keep_rewards: bool = False,
) -> Rollout:
    """Run ``episodes`` whole episodes in rounds of one episode per environment.

    A round ends when its last episode does; what an environment that finished earlier does meanwhile is discarded, so
    that short episodes are not over-represented. (The own environments are not stepped then: see ``park`` of
    :class:`gac_fast.envs.batch.BatchVectorEnv`.) Any autoreset mode will do.

    Several vectors are run as one: their rows are numbered through, and plans and actors are made for all of them at
    once. Each vector has a thread that acts and steps by turns without waiting for the others, so one is stepped while
    another acts, and neither processor nor simulator idles. Given the same seeds and plans, results are those of one
    vector of all rows, to the rounding of an actor whose sums depend on how many rows it is given. (An actor without
    ``split`` acts for all rows at once, in the calling thread, after all vectors have stepped.)

    Args:
        env: any ``gymnasium.vector.VectorEnv`` with flat float observations and a Box action space, or a sequence of
            such: two halves, as :func:`gac_fast.envs.make_halves` makes them.
        make_actor: called at the start of every round.
        seed: round r resets with ``seed + r * num_envs``, to which vector environments add the row: no start is seeded
            twice. Seeds stay below 2^31 and begin again at 0 there.
        keep: episodes, from the first, whose observations and actions are kept.
        on_step: called with (episodes finished, time steps made) in the calling thread, after every step; where vectors
            are stepped in threads of their own, some times a second and at the end of a round.
        timeout: seconds that a step or a reset may take. None waits for ever, and steps a single vector in the calling
            thread: for simulators that must stay in it.
        keep_rewards: keep the rewards of the kept episodes' steps too.

    Raises:
        EnvError: an observation or reward is not finite, or an environment raised, died or did not answer in time. Its
            ``environment`` and ``step`` say where, and its ``finished`` holds the episodes that were finished before,
            those of the broken round included. What has crashed or hangs cannot be used further; close it.
    """
    if episodes < 1:
        raise EnvError(f"episodes: expected at least 1, got {episodes}")
    if timeout is not None and not timeout > 0:
        raise EnvError(f"timeout: expected more than 0 seconds, got {timeout}")
    run = _Run(list(env) if isinstance(env, Sequence) else [env], episodes, keep, on_step, timeout, keep_rewards)
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

    def keep(self, **steps: np.ndarray) -> None:
        """Append the steps of one episode, columns of [H, ...]."""
        for name, rows in steps.items():
            self._columns.setdefault(f"packed_{name}", _Grows()).append(rows)

    def rollout(self) -> Rollout:
        arrays = {name: grows.rows() for name, grows in self._columns.items()}
        if not self._has_seeds:
            arrays.pop("z0", None)
        for name, dim in zip(("packed_observations", "packed_actions"), self._dims, strict=True):
            arrays.setdefault(name, np.empty((0, dim), np.float32))
        return Rollout(n_kept=self.n_kept, **arrays)  # type: ignore[arg-type]


class _Steps:
    """The steps of those of a part's rows that are kept, by time: [T, n, ...], T doubling."""

    def __init__(self, rows: slice, n_keep: int, obs_dim: int, act_dim: int, keep_rewards: bool) -> None:
        self._first = rows.start
        self._n = max(0, min(rows.stop, n_keep) - rows.start)
        self._columns = {
            "observations": np.empty((FIRST_STEPS, self._n, obs_dim), np.float32),
            "actions": np.empty((FIRST_STEPS, self._n, act_dim), np.float32),
        }
        if keep_rewards:
            self._columns["rewards"] = np.empty((FIRST_STEPS, self._n))

    def write(self, t: int, observations: np.ndarray, actions: np.ndarray) -> None:
        """What the part's rows saw and did at step ``t``."""
        if self._n == 0:
            return
        if t >= len(self._columns["observations"]):
            self._columns = {name: np.concatenate((x, np.empty_like(x))) for name, x in self._columns.items()}
        self._columns["observations"][t], self._columns["actions"][t] = observations[: self._n], actions[: self._n]

    def pay(self, t: int, rewards: np.ndarray) -> None:
        """What step ``t`` earned."""
        if self._n and "rewards" in self._columns:
            self._columns["rewards"][t] = rewards[: self._n]

    def episode(self, row: int, length: int) -> dict[str, np.ndarray]:
        return {name: x[:length, row - self._first] for name, x in self._columns.items()}


class _PartError(Exception):
    """Why a rollout ends: ``what`` happened in row ``row`` (None: unknown) at ``step``."""

    def __init__(self, what: str, row: int | None, step: int, detail: str = "") -> None:
        super().__init__(what)
        self.what, self.row, self.step, self.detail = what, row, step, detail


class _Worker:
    """A thread that does one job after another.

    It is a daemon: a simulator that never returns cannot be stopped, but must not keep the program from ending.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        # What is set for the calling thread, such as a forced backend, is meant for its helpers too.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=lambda: context.run(self._work), name="gac_fast rollout", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._results.put((job(), None))
            except BaseException as error:
                self._results.put((None, error))

    def submit(self, job: Callable[[], Any]) -> None:
        self._jobs.put(job)

    def result(self, timeout: float | None) -> Any:
        """Of the oldest job whose result has not been asked for.

        Raises:
            queue.Empty: there was none within ``timeout`` seconds.
        """
        result, error = self._results.get(timeout=timeout)
        if error is not None:
            raise error
        return result

    def close(self, timeout: float) -> None:
        """End after the present job, and wait for that for a while."""
        self._jobs.put(None)
        self._thread.join(timeout)


class _Part:
    """One of the vectors, with what is under way in it; its rows are ``rows`` of the whole."""

    def __init__(
        self, env: VectorEnv[Any, Any, Any], first: int, timeout: float | None, worker: _Worker | None
    ) -> None:
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode

        self.env = env
        self.rows = slice(first, first + env.num_envs)
        self.worker = worker
        self.inline = worker is None
        """Whether the environment is called by whoever waits for it."""
        self.since: float | None = None
        """When the call that is under way began."""
        self.t = 0
        """Steps of the present round, the one under way included."""
        self.n_running = 0
        """Rows whose episode of the present round is not over."""
        self.steps_made = 0
        """By such rows, in all rounds."""
        self.pending = False
        self.hangs = False
        self._timeout = timeout
        self._limit = timeout
        # A vector of processes finds out by itself, and better, which of them does not answer.
        self._is_async = isinstance(env, AsyncVectorEnv)
        if timeout is not None and self._is_async:
            self._limit = timeout + ASYNC_GRACE
        self._disabled = env.metadata.get("autoreset_mode") == AutoresetMode.DISABLED
        self._mask: npt.NDArray[np.bool_] | None = None
        # Of an environment that can leave rows of no interest as they are, which is quicker than to step them.
        self.park: Callable[[npt.NDArray[np.bool_] | None], None] | None = getattr(env.unwrapped, "park", None)
        self._call: Callable[[], Any] = lambda: None

    def reset(self, seed: int | None) -> None:
        """Begin the reset of all rows."""
        self.t, self._mask = 0, None
        self._begin(lambda: self._reset(seed=seed))

    def step(self, actions: np.ndarray) -> None:
        """Begin a step."""
        self.t += 1
        self._begin(lambda: self._step(actions))

    def ended(self, mask: npt.NDArray[np.bool_]) -> None:
        """Take note of the rows that the last step ended, before the next one begins."""
        if self.park is not None:
            self.park(mask)
        elif self._disabled:
            self._mask = mask

    def wait(self) -> Any:
        """The result of what was begun."""
        try:
            if self.inline:
                result = self._timed()
            else:
                assert self.worker is not None
                result = self.worker.result(self._limit)
        except queue.Empty:
            raise self.overdue() from None
        except Exception as error:
            raise self._failure(error) from error
        self.pending = False
        return result

    def seconds_left(self) -> float | None:
        """Until a call that is under way is overdue; None for ever."""
        since = self.since
        if self._limit is None:
            return None
        return self._limit if since is None else self._limit - (time.monotonic() - since)

    def overdue(self) -> _PartError:
        """The failure of a call that did not come back."""
        self.hangs = True
        return self._failure(TimeoutError(f"no answer within {self._timeout:g} s"))

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close(0.0 if self.hangs else CLOSE_SECONDS)

    def _begin(self, call: Callable[[], Any]) -> None:
        self._call, self.pending = call, True
        if not self.inline:
            assert self.worker is not None
            self.worker.submit(self._timed)

    def _timed(self) -> Any:
        self.since = time.monotonic()
        try:
            return self._call()
        finally:
            self.since = None

    def _reset(self, **arguments: Any) -> Any:
        if not self._is_async:
            return self.env.reset(**arguments)
        base: Any = self.env
        base.reset_async(**arguments)
        with self._answers():
            return base.reset_wait(self._timeout)

    def _step(self, actions: np.ndarray) -> Any:
        if self._mask is not None:
            self._reset(options={"reset_mask": self._mask})
            self._mask = None
        if not self._is_async:
            return self.env.step(actions)
        base: Any = self.env
        base.step_async(actions)
        with self._answers():
            return base.step_wait(self._timeout)

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        try:
            yield
        except multiprocessing.TimeoutError:
            error = TimeoutError(f"no answer within {self._timeout:g} s")
            pipes = enumerate(self.env.parent_pipes)  # type: ignore[attr-defined]
            silent = [row for row, pipe in pipes if pipe is not None and not pipe.closed and not pipe.poll()]
            if silent:
                error.environment = silent[0]  # type: ignore[attr-defined]
            raise error from None

    def _failure(self, error: Exception) -> _PartError:
        row = getattr(error, "environment", None)
        if row is None and not isinstance(error, TimeoutError):
            row = _row_in_traceback(error)
            row = _row_of_processes(self.env) if row is None else row
        n = self.rows.stop - self.rows.start
        if row is not None:
            row += self.rows.start
            where = f"environment {row}"
        elif n == 1:
            where = f"environment {self.rows.start}"
        else:
            where = f"one of the environments {self.rows.start} to {self.rows.stop - 1}"
        # What the system raises says little without its name.
        named = isinstance(error, EOFError | OSError | AssertionError) and not isinstance(error, TimeoutError)
        what = f"{type(error).__name__}: {error}" if named else str(error)
        return _PartError(f"{where} failed", row, self.t, f": {what}")


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
    dead = multiprocessing.connection.wait([process.sentinel for process in base.processes], timeout=1.0)
    return next((row for row, process in enumerate(base.processes) if process.sentinel in dead), None)


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
        keep_rewards: bool,
    ) -> None:
        self.episodes, self.keep, self.on_step = episodes, keep, on_step
        self.keep_rewards = keep_rewards
        self.obs_dim, self.act_dim = _checked_dims(envs)
        self.n = sum(env.num_envs for env in envs)
        self.finished = _Finished(self.obs_dim, self.act_dim)
        self.obs = np.zeros((self.n, self.obs_dim), np.float32)
        self.pinned: Any = None
        self.round_index = 0
        self.stopped = False
        self.together = False
        """Whether parts act and step in threads of their own, without this one."""
        self.events: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.told = (0, 0)
        firsts = np.cumsum([0, *(env.num_envs for env in envs)])
        in_threads = len(envs) > 1 or timeout is not None
        self.parts = [
            _Part(env, int(first), timeout, _Worker() if in_threads else None)
            for env, first in zip(envs, firsts[:-1], strict=True)
        ]

    def close(self) -> None:
        """End the threads, each after the step it is in."""
        self.stopped = True
        for part in self.parts:
            part.close()
            if part.park is not None and not part.hangs:
                # The environment is the caller's again.
                part.park(None)

    def round(self, make_actor: MakeActor, seed: int | None) -> None:
        """One episode in every environment, or in as many as are still wanted."""
        n, start = self.n, self.finished.n
        self.wanted = min(n, self.episodes - start)
        self.running = np.arange(n) < self.wanted
        self.total, self.length = np.zeros(n), np.zeros(n, np.int64)
        self.rewards = np.zeros(n)
        self.terminated = np.zeros(n, np.bool_)
        self.n_keep = max(0, min(self.wanted, self.keep - start))
        self.steps = [
            _Steps(part.rows, self.n_keep, self.obs_dim, self.act_dim, self.keep_rewards) for part in self.parts
        ]
        try:
            self._reset(None if seed is None else _round_seed(seed, self.round_index, n))
            self.firsts = self.obs.copy()
            actor = make_actor(self.firsts.copy(), start)
            self.z0 = _seeds(actor)
            self._pin(actor)
            self._play_all(actor)
        except _PartError as failure:
            ended = np.flatnonzero(~self.running[: self.wanted])
            when = f"at step {failure.step}" if failure.step else "at its reset"
            error = EnvError(f"{failure.what} {when}, {start + len(ended)} episodes done{failure.detail}")
            if len(ended):
                self._store(ended)
            error.environment, error.step = failure.row, failure.step
            error.finished = self.finished.rollout() if self.finished.n else None
            raise error from failure.__cause__
        self._store(np.arange(self.wanted))
        self.round_index += 1

    def _reset(self, seed: int | None) -> None:
        for part in self.parts:
            part.reset(None if seed is None else seed + part.rows.start)
        for part in self.parts:
            observations, _ = part.wait()
            part.n_running = int(np.count_nonzero(self.running[part.rows]))
            self._observe(part, observations)
            if part.park is not None:
                part.park(~self.running[part.rows])

    def _play_all(self, actor: Acts) -> None:
        split = getattr(actor, "split", None)
        if len(self.parts) == 1 or split is None:
            for part in self.parts:
                part.inline = part.worker is None
            self._play(_Unit(actor, self.parts))
            return
        actors = split([part.env.num_envs for part in self.parts])
        units = [_Unit(one, [part]) for one, part in zip(actors, self.parts, strict=True)]
        units = [unit for unit in units if self.running[unit.rows].any()]
        self.together = True
        for unit in units:
            unit.parts[0].inline = True
            unit.parts[0].worker.submit(functools.partial(self._play_and_tell, unit))  # type: ignore[union-attr]
        for _ in units:
            error = self._next_end(units)
            if error is not None:
                self.stopped = True
                raise error
        self.together = False
        self._tell()
        for unit in units:
            unit.parts[0].inline = False
            unit.parts[0].worker.result(None)  # type: ignore[union-attr]

    def _play_and_tell(self, unit: _Unit) -> None:
        try:
            self._play(unit)
            self.events.put(None)
        except BaseException as error:
            self.events.put(error)

    def _next_end(self, units: list[_Unit]) -> BaseException | None:
        """Wait for the end of a part, and with which error; those that hang are found out here."""
        while True:
            left = [(seconds, unit.parts[0]) for unit in units if (seconds := unit.parts[0].seconds_left()) is not None]
            seconds, part = min(left, key=lambda one: one[0]) if left else (None, None)
            if seconds is not None and seconds <= 0 and part is not None:
                return part.overdue()
            if self.on_step is not None:
                self._tell()
                seconds = TELL_SECONDS if seconds is None else min(seconds, TELL_SECONDS)
            with contextlib.suppress(queue.Empty):
                return self.events.get(timeout=seconds)

    def _play(self, unit: _Unit) -> None:
        """Step the parts of a unit until all of their episodes have ended."""
        rewarded = getattr(unit.actor, "rewarded", None)
        rest = getattr(unit.actor, "rest", None)
        n_running = -1
        self._act(unit)
        while any(part.pending for part in unit.parts) and not self.stopped:
            for part in unit.parts:
                if part.pending:
                    self._end(part, rewarded is not None)
            if any(part.n_running for part in unit.parts):
                if rewarded is not None:
                    rewarded(self.rewards[unit.rows])
                    self.rewards[unit.rows] = 0.0
                if rest is not None and n_running != (n_running := sum(part.n_running for part in unit.parts)):
                    rest(~self.running[unit.rows])
                self._act(unit)

    def _act(self, unit: _Unit) -> None:
        """Choose actions and begin the steps."""
        actions = np.asarray(unit.actor.act(self.obs[unit.rows]))
        for part in unit.parts:
            if not part.n_running:
                continue
            own = actions[part.rows.start - unit.rows.start : part.rows.stop - unit.rows.start]
            row = self._lost(part, np.isfinite(own))
            if row is not None:
                raise _PartError(f"the actor gave environment {row} an action that is not finite", row, part.t + 1)
            self.steps[self.parts.index(part)].write(part.t, self.obs[part.rows], own)
            part.step(own)

    def _end(self, part: _Part, keeps_rewards: bool) -> None:
        """Wait for a step and book it. Few operations: at this size each takes longer than the arithmetic in it."""
        observations, reward, termination, truncation, _ = part.wait()
        rows = part.rows
        running = self.running[rows]
        self._observe(part, observations)
        reward = np.asarray(reward, np.float64)
        row = self._lost(part, np.isfinite(reward))
        if row is not None:
            raise _PartError(f"environment {row} returned a non-finite reward", row, part.t)
        self.steps[self.parts.index(part)].pay(part.t - 1, reward)
        total = self.total[rows]
        np.add(total, reward, out=total, where=running)
        if keeps_rewards:
            self.rewards[rows] = np.where(running, reward, 0.0)
        part.steps_made += part.n_running
        termination = np.asarray(termination, np.bool_)
        ended = termination | np.asarray(truncation, np.bool_)
        if ended.any():
            part.ended(ended)
            self.terminated[rows] |= running & termination
            self.length[rows][running & ended] = part.t
            # Last, as it declares the episodes finished to the other threads.
            running &= ~ended
            part.n_running = int(np.count_nonzero(running))
        if not self.together:
            self._tell()

    def _lost(self, part: _Part, finite: npt.NDArray[np.bool_]) -> int | None:
        """The first running row that is not ``finite``, bool [n] or [n, ...]; None where there is none."""
        if finite.all():
            return None
        lost = self.running[part.rows] & ~finite.reshape(len(finite), -1).all(axis=1)
        return part.rows.start + int(lost.argmax()) if lost.any() else None

    def _tell(self) -> None:
        """Report progress, if there is any."""
        done = self.finished.n + self.wanted - int(np.count_nonzero(self.running))
        progress = done, sum(part.steps_made for part in self.parts)
        if self.on_step is not None and progress != self.told:
            self.told = progress
            self.on_step(*progress)

    def _observe(self, part: _Part, observations: np.ndarray) -> None:
        """Take over what was observed; what environments observe that are not running may be anything."""
        own = self.obs[part.rows]
        own[...] = observations
        finite = np.isfinite(own)
        if finite.all():
            return
        row = self._lost(part, finite)
        if row is not None:
            raise _PartError(f"environment {row} returned a non-finite observation", row, part.t)
        own[~finite] = 0.0

    def _pin(self, actor: Acts) -> None:
        """Observations for an actor on a GPU lie in memory that it can read without the host's help."""
        device = getattr(actor, "device", None)
        if self.pinned is None and getattr(device, "type", None) == "cuda":
            import torch

            self.pinned = torch.from_numpy(self.obs).pin_memory()
            self.obs = self.pinned.numpy()

    def _store(self, rows: npt.NDArray[np.int64]) -> None:
        """Add the episodes of these rows, in ascending order, to the finished ones."""
        kept = rows[rows < self.n_keep]
        for part, steps in zip(self.parts, self.steps, strict=True):
            for row in kept[(kept >= part.rows.start) & (kept < part.rows.stop)]:
                self.finished.keep(**steps.episode(int(row), int(self.length[row])))
        self.finished.add(
            len(kept),
            None if self.z0 is None else self.z0[rows],
            returns=self.total[rows],
            lengths=self.length[rows],
            terminated=self.terminated[rows],
            first_observations=self.firsts[rows],
            numbers=self.round_index * self.n + rows,
        )


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
