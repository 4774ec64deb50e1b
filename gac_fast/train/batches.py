"""Trajectories drawn and packed into the batches an update takes, by a thread of its own while updates run."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy.typing as npt
import torch
from torch import Tensor

from gac_fast import ops
from gac_fast.config import Config
from gac_fast.data import Trajectories
from gac_fast.model import Batch
from gac_fast.model.normalization import Normalization
from gac_fast.ops.pack_batch import works_beside
from gac_fast.train.feeder import Feeder

__all__ = ["Batches", "Mix", "bucket"]

# Second words of the key: no other noise of a run shares them ("BATC", "BATO", "BATB").
KEY, ONLINE_KEY, BEST_KEY = 0x42415443, 0x4241544F, 0x42415442

# Tensors of a batch with an entry for every time step; the others have one for every trajectory.
PER_STEP = {"observations", "actions", "positions", "sequence", "dropped"}

# Each tensor of a batch begins at a multiple of this many bytes.
ALIGNMENT = 64


class Mix(NamedTuple):
    """Offline and online trajectories in one data set, drawn apart, and where their chains are."""

    online: Tensor
    """bool [B], which trajectories are online."""
    best: Tensor
    """bool [B], which of those are drawn apart from the others."""
    share: float
    """Of each batch, drawn from online ones; all of it where there are no others."""
    best_share: float
    """Of that, drawn from the best."""
    rows: Tensor
    """int64 [B], the posterior's trajectory that stands for each."""
    n_chains: int
    """Trajectories that the posterior has."""


class Batches:
    """Packed batches of a data set that stays where it is (no copy is made of it).

    Batch ``number`` is a function of the data set, the configuration and its seed alone. Where the C++ engine draws
    and packs, a thread prepares the next ``config.train.prefetch`` batches while the caller works on one.

    Args:
        data: all episodes, held-out ones included; trajectory numbers are positions in it.
        normalization: on the CPU.
        held_out: int64 [h], trajectories never drawn.
        config: seed, batch size, share of tau-only rows, dropout of action tokens, batches prepared ahead.
        device: where batches go.
        bucketed: fill drawn batches up to one of a few sizes (:func:`bucket`), for which compiled code and recorded
            graphs are made; None does so on CUDA, and wherever the configuration compiles or records.
        mix: of offline and online trajectories; None: all are of one kind, and chain i is that of trajectory i.

    Attributes:
        n_steps: time steps of the batch drawn last, what fills it up left aside.
    """

    def __init__(
        self,
        data: Trajectories,
        normalization: Normalization,
        held_out: Tensor,
        config: Config,
        device: torch.device,
        bucketed: bool | None = None,
        mix: Mix | None = None,
    ) -> None:
        self.normalization = normalization.to(device)
        self.device = device
        if bucketed is None:
            bucketed = device.type == "cuda" or "on" in (config.train.compile, config.train.cuda_graph)
        self._packer = p = _Packer(data, normalization, held_out, config, device.type == "cuda", bucketed, mix)
        self.size = p.size
        self.n_steps = 0
        depth = config.train.prefetch
        self._feeder = Feeder(p.pack, depth) if depth > 0 else None

    def draw(self, number: int) -> tuple[Batch, Tensor]:
        """Random batch ``number``: trajectories without repetition, drawn by their weights.

        Numbers that follow one another are prepared ahead; any may be asked for at any time.

        Returns:
            the batch, and the posterior rows of its chains, int64 [b]: row i of trajectory i given (tau, y), row
            B + i where the chain sees tau alone (a share of the batch, and every cut episode), row 2 B where the
            trajectory only fills the batch up. With a mix, its rows and its number of chains take the place of i and B.
        """
        if self._feeder is not None and works_beside():
            packed = self._feeder.take(number)
        else:
            # The reference's own threads would compete with those of the update.
            self.close()
            packed = self._packer.pack(number)
        x = packed.tensors
        self.n_steps = packed.n_steps
        if self.device.type != "cpu":
            on_device = packed.block.to(self.device, non_blocking=True)
            packed.slot.copied = torch.cuda.Event()
            packed.slot.copied.record(torch.cuda.current_stream(self.device))
            x = carve(on_device, packed.layout)
        batch = Batch(
            self.normalization.observations(x["observations"]), self.normalization.actions(x["actions"]),
            x["cu_seqlens"], x["positions"], x["sequence"], x["returns"], x["has_return"], x["has_label"],
            x.get("dropped"), x.get("is_real"),
        )  # fmt: skip
        return batch, x["rows"]

    def of(self, ids: Tensor, has_return: Tensor | None = None, dropped: Tensor | None = None) -> Batch:
        """The batch of given trajectories.

        Args:
            ids: int64 [b].
            has_return: bool [b], which chains may see the return; None hides it from all.
            dropped: bool [n], action tokens left out.
        """
        p = self._packer
        packed = ops.pack_batch(p.observations, p.actions, p.cu_seqlens, ids)
        if has_return is None:
            has_return = torch.zeros(len(ids), dtype=torch.bool)

        def move(x: Tensor) -> Tensor:
            return x.to(self.device, non_blocking=True)

        return Batch(
            self.normalization.observations(move(packed.observations)),
            self.normalization.actions(move(packed.actions)),
            move(packed.cu_seqlens), move(packed.positions), move(packed.sequence),
            move(p.returns[ids]), move(has_return), move(p.complete[ids]), None if dropped is None else move(dropped),
        )  # fmt: skip

    def shares(self) -> Tensor:
        """float64 [B], of drawn batches that are each trajectory, where drawing without repetition takes no toll."""
        shares = torch.zeros_like(self._packer.weights)
        for group in self._packer.groups:
            shares += group.size / self.size * group.weights / group.weights.sum()
        return shares

    def close(self) -> None:
        """End the thread, if there is one; a later :meth:`draw` starts another."""
        if self._feeder is not None:
            self._feeder.close()


def bucket(n: int) -> int:
    """The least size of at least ``n`` that is one of eight per octave: at most an eighth more, 4% on average."""
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


Layout = dict[str, tuple[torch.dtype, tuple[int, ...], int]]
"""Name -> dtype, shape and first byte of each tensor in a block."""


class _Packed(NamedTuple):
    """A batch in host memory, in environment units."""

    slot: _Slot
    block: Tensor  # uint8, all of it
    layout: Layout
    tensors: dict[str, Tensor]  # views of the block
    n_steps: int  # of real trajectories


class _Slot:
    """Host memory for one batch, used again once nothing reads it.

    Attributes:
        copied: passed when the copy to the device, if there was one, is done.
    """

    def __init__(self, n_bytes: int, pin_memory: bool) -> None:
        self._memory = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pin_memory).numpy()
        self._lent: weakref.ref[npt.NDArray[Any]] | None = None
        self.copied: torch.cuda.Event | None = None

    def lend(self, n_bytes: int) -> Tensor:
        """The first bytes, as uint8."""
        array = self._memory[:n_bytes]
        # The tensor keeps this one array alive, as does every view of it and all that autograd saved: when it is gone,
        # nobody can read the memory any more.
        self._lent = weakref.ref(array)
        return torch.from_numpy(array)

    @property
    def is_lent(self) -> bool:
        return self._lent is not None and self._lent() is not None

    @property
    def is_copying(self) -> bool:
        return self.copied is not None and not self.copied.query()

    def wait(self) -> None:
        """Until the copy to the device is done."""
        if self.copied is not None:
            self.copied.synchronize()


class _Packer:
    """Draws and packs; called by one thread at a time."""

    def __init__(
        self,
        data: Trajectories,
        normalization: Normalization,
        held_out: Tensor,
        config: Config,
        pin_memory: bool,
        bucketed: bool,
        mix: Mix | None,
    ) -> None:
        self.observations = torch.from_numpy(data.observations)
        self.actions = torch.from_numpy(data.actions)
        self.cu_seqlens = torch.from_numpy(data.cu_seqlens)
        self.complete = torch.from_numpy(data.complete)
        returns = normalization.returns(torch.from_numpy(data.returns)).to(torch.float32)
        self.returns = torch.where(self.complete, returns, 0.0)
        self.lengths = self.cu_seqlens.diff()
        self.weights = self.lengths.to(torch.float64)
        if config.train.sampling == "uniform":
            self.weights.fill_(1.0)
        self.weights[held_out] = 0.0
        b = len(self.complete)
        self.chains = torch.arange(b) if mix is None else mix.rows
        self.n_chains = b if mix is None else mix.n_chains
        self.size = min(config.train.batch_size, int((self.weights > 0).sum()))
        self.groups = _groups(self.weights, self.size, config, mix)
        self.sees_return = torch.cat([torch.arange(g.size) < g.size - g.n_tau_only for g in self.groups])
        self.action_token_dropout = config.model.action_token_dropout
        self.seed = (config.train.seed, KEY)
        self.pin_memory = pin_memory
        self.bucketed = bucketed
        # One more, to hold the steps that fill a batch up.
        self.whole_size = bucket(self.size + 1) if bucketed else self.size
        self.most_slots = config.train.prefetch + 2
        self._slots: list[_Slot] = []

    def pack(self, number: int) -> _Packed:
        drawn = [ops.draw_trajectories(g.weights, g.size, (self.seed[0], g.key), number) for g in self.groups]
        ids = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        n = int(self.lengths[ids].sum())
        whole_n = bucket(n + 1) if self.bucketed else n
        layout, n_bytes = self._layout(whole_n)
        slot = self._free_slot()
        block = slot.lend(n_bytes)
        whole = carve(block, layout)
        # What the trajectories take of it.
        x = {name: part[: n if name in PER_STEP else self.size] for name, part in whole.items()}
        x["cu_seqlens"] = whole["cu_seqlens"][: self.size + 1]
        out = ops.PackedBatch(*(x[name] for name in ops.PackedBatch._fields))
        ops.pack_batch(self.observations, self.actions, self.cu_seqlens, ids, out=out)
        if self.action_token_dropout > 0:
            ops.drop_steps(n, self.action_token_dropout, self.seed, number, out=x["dropped"])
        torch.index_select(self.returns, 0, ids, out=x["returns"])
        torch.index_select(self.complete, 0, ids, out=x["has_label"])
        # Trajectories of a group come in random order: those at its end, which hide their return, are any.
        torch.logical_and(x["has_label"], self.sees_return, out=x["has_return"])
        rows = self.chains[ids]
        torch.where(x["has_return"], rows, rows + self.n_chains, out=x["rows"])
        if self.bucketed:
            self._fill_up(whole, n)
        return _Packed(slot, block, layout, whole, n)

    def _fill_up(self, whole: dict[str, Tensor], n: int) -> None:
        """Trajectories without steps, and a last one with all steps that are too many, at least one."""
        for name, part in whole.items():
            part[n if name in PER_STEP else self.size :] = 0
        torch.arange(len(whole["positions"]) - n, out=whole["positions"][n:])
        whole["sequence"][n:] = self.whole_size - 1
        whole["cu_seqlens"][self.size :] = n
        whole["cu_seqlens"][-1] = len(whole["positions"])
        whole["rows"][self.size :] = 2 * self.n_chains
        whole["is_real"][: self.size] = True

    def _layout(self, n: int) -> tuple[Layout, int]:
        b = self.whole_size
        fields: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "observations": (torch.float32, (n, self.observations.shape[1])),
            "actions": (torch.float32, (n, self.actions.shape[1])),
            "cu_seqlens": (torch.int32, (b + 1,)),
            "positions": (torch.int64, (n,)),
            "sequence": (torch.int64, (n,)),
            "returns": (torch.float32, (b,)),
            "has_return": (torch.bool, (b,)),
            "has_label": (torch.bool, (b,)),
            "rows": (torch.int64, (b,)),
        }
        if self.bucketed:
            fields["is_real"] = (torch.bool, (b,))
        if self.action_token_dropout > 0:
            fields["dropped"] = (torch.bool, (n,))
        layout: Layout = {}
        begin = 0
        for name, (dtype, shape) in fields.items():
            layout[name] = (dtype, shape, begin)
            begin += -(-_n_bytes(dtype, shape) // ALIGNMENT) * ALIGNMENT
        return layout, begin

    def _free_slot(self) -> _Slot:
        """A slot that nothing reads any more."""
        free = [slot for slot in self._slots if not slot.is_lent]
        for slot in free:
            if not slot.is_copying:
                return slot
        if len(self._slots) >= self.most_slots:
            if free:
                # The device is that many batches behind: wait for it rather than pin more memory.
                free[0].wait()
                return free[0]
            # The caller keeps all these batches: the first takes its memory with it.
            self._slots.pop(0)
        longest = int(self.lengths[self.weights > 0].topk(self.size).values.sum())
        slot = _Slot(self._layout(bucket(longest + 1) if self.bucketed else longest)[1], self.pin_memory)
        self._slots.append(slot)
        return slot


class _Group(NamedTuple):
    """Trajectories drawn together."""

    weights: Tensor  # float64 [B], 0 for those of other groups
    size: int  # drawn of them
    n_tau_only: int  # at the end, which hide their return
    key: int


def _groups(weights: Tensor, size: int, config: Config, mix: Mix | None) -> list[_Group]:
    fraction = config.posterior.tau_only_fraction
    parts = [(weights, size, KEY)]
    if mix is not None:
        offline, others, best = (
            torch.where(which, weights, 0.0) for which in (~mix.online, mix.online & ~mix.best, mix.best)
        )
        most_offline, most_others, most_best = (int((w > 0).sum()) for w in (offline, others, best))
        n_online = min(max(round(mix.share * size), size - most_offline), most_others + most_best)
        n_best = min(max(round(mix.best_share * n_online), n_online - most_others), most_best)
        parts = [(offline, size - n_online, KEY), (others, n_online - n_best, ONLINE_KEY), (best, n_best, BEST_KEY)]
    groups = [_Group(w, n, round(fraction * n), key) for w, n, key in parts if n > 0]
    # At least one where asked for: without any, the return model's variance is never fitted.
    if fraction > 0 and size > 1 and not any(g.n_tau_only for g in groups):
        groups[-1] = groups[-1]._replace(n_tau_only=1)
    return groups


def carve(block: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a block of bytes, as views."""
    return {
        name: block[begin : begin + _n_bytes(dtype, shape)].view(dtype).view(shape)
        for name, (dtype, shape, begin) in layout.items()
    }


def _n_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    n = dtype.itemsize
    for size in shape:
        n *= size
    return n
