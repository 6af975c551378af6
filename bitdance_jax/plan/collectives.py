"""What devices send to each other in a compiled program: kinds, bytes, groups, and how long they take on a torus or a switch."""

import math
import re
from dataclasses import dataclass

import jax
import numpy as np

from bitdance_jax.perf.hardware import Chip
from bitdance_jax.plan.hlo import Computation, Instruction, Module, leaves


KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)

HOP_SECONDS = 1e-6
"""Assumed time from a device to the next one, however small the message."""


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclass(frozen=True)
class Collective:
    """One exchange.

    Attributes:
      kind: one of `KINDS`.
      bytes: size of the whole array on one device of the group: gathered, before it is reduced or scattered, exchanged.
      devices: numbers of the devices in the first group; the others are like it.
      channel: a number that all parts of one exchange share; "" if it has none.
    """

    kind: str
    bytes: int
    devices: tuple[int, ...]
    channel: str

    @property
    def size(self) -> int:
        """Devices in a group."""
        return len(self.devices)

    @property
    def sent(self) -> int:
        """Bytes that each device sends, when the exchange goes round a ring."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.size - 1) // self.size

    def axes(self, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
        """The axes of the mesh that the exchange runs along."""
        places = np.stack(np.unravel_index(self.devices, mesh.devices.shape))
        return tuple(
            name
            for name, along in zip(mesh.axis_names, places, strict=True)
            if len(set(along.tolist())) > 1
        )

    def seconds(self, mesh: jax.sharding.Mesh, chip: Chip) -> float:
        """On an otherwise idle network.

        On a torus an exchange uses both directions of every axis that its group stretches over, where that axis closes to a ring; one where
        it does not. Groups that interleave share the links. All-to-all is bound by the middle of the longest ring.
        """
        if self.size == 1:
            return 0.0
        if not chip.torus:
            return self.sent / chip.link + HOP_SECONDS
        coordinates = np.array(
            [getattr(device, "coords", (0, 0, 0)) for device in mesh.devices.flat]
        )
        places = coordinates[list(self.devices)]
        extents = places.max(0) - places.min(0) + 1
        rings = wrapped(coordinates.max(0) + 1, chip) & (extents == coordinates.max(0) + 1)
        links = sum(
            2 if ring else 1 for ring, extent in zip(rings, extents, strict=True) if extent > 1
        )
        bandwidth = chip.link * max(links, 1) * min(1.0, self.size / math.prod(extents.tolist()))
        hops = sum(
            int(extent) // 2 if ring else int(extent) - 1
            for ring, extent in zip(rings, extents, strict=True)
        )
        sent: float = self.sent
        if self.kind == "all-to-all":
            longest = int(extents.argmax())
            sent, bandwidth = (
                self.bytes * int(extents[longest]) / 4,
                chip.link * (2 if rings[longest] else 1),
            )
        if self.kind == "collective-permute":
            bandwidth = chip.link
        return sent / bandwidth + max(hops, 1) * HOP_SECONDS


def wrapped(extents: np.ndarray, chip: Chip) -> np.ndarray:
    """Which axes of a slice close to rings: those of 16 in two dimensions, all where every one is a multiple of 4 in three."""
    return extents == 16 if chip.torus == 2 else np.full(3, bool(np.all(extents % 4 == 0)))


def find(
    module: Module, computation: Computation, instruction: Instruction, devices: int
) -> list[Collective]:
    """The exchanges that an instruction makes or begins; those inside a fusion too. "-done" halves make none.

    Args:
      devices: how many run the program.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        size = sum(
            leaf.bytes for name in instruction.operands for leaf in leaves(computation[name].shape)
        )
        members = _members(instruction, devices)
        if kind == "all-gather":
            size *= len(members)
        channel = instruction.attribute(r"channel_id=(\d+)") or ""
        return [Collective(kind, size, members, channel)]
    if instruction.opcode != "fusion":
        return []
    name = instruction.called("calls") or ""
    found = [part for inner in module[name] for part in find(module, module[name], inner, devices)]
    if (
        "all-reduce-scatter" in name
    ):  # a TPU's reduce-scatter: an all-reduce of which each device keeps a slice
        found = [
            Collective("reduce-scatter", part.bytes, part.devices, part.channel) for part in found
        ]
    return found


def _members(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of the attribute `replica_groups`, in any of its three spellings, or of a permutation's pairs."""
    text = instruction.attributes
    if pairs := re.findall(
        r"\{(\d+),(\d+)\}",
        instruction.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}") or "",
    ):
        return _cycle({int(source): int(target) for source, target in pairs})
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(number) for number in found[1].split(","))
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text):
        return tuple(_iota(*found.groups()[1:]).reshape(_integers(found[1]))[0].tolist())
    if found := re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{_IOTA}|([\d,]+))\))? \{{([^}}]*)\}}",
        text,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", found[1])}
        order = (
            _iota(found[2], found[3])
            if found[2]
            else np.array(_integers(found[4]) if found[4] else range(devices))
        )
        return tuple(
            order.ravel()[
                _along(sizes, re.findall(r"('[^']*')(?::\((\d+)\)(\d+))?", found[5]))
            ].tolist()
        )
    return tuple(range(devices))


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in an array of these sizes, its axes then reordered."""
    numbers = np.arange(math.prod(_integers(sizes))).reshape(_integers(sizes))
    return numbers.transpose(_integers(order)) if order else numbers


def _along(sizes: dict[str, int], axes: list[tuple[str, str, str]]) -> np.ndarray:
    """Places along whole axes of a mesh or parts of them: (name, steps before the part, its size)."""
    strides = dict(
        zip(sizes, np.cumprod([1, *reversed(sizes.values())])[-2::-1].tolist(), strict=True)
    )
    places = np.zeros((), int)
    for name, before, size in axes:
        count = int(size) if size else sizes[name]
        places = np.add.outer(
            places, strides[name] * (sizes[name] // int(before or 1) // count) * np.arange(count)
        )
    return places.ravel()


def _cycle(targets: dict[int, int]) -> tuple[int, ...]:
    """The devices that a permutation passes through, from its first source on."""
    at = next(iter(targets))
    members = [at]
    while (at := targets.get(at, members[0])) != members[0]:
        members.append(at)
    return tuple(members)
