"""The collectives of a compiled program: kind, bytes, devices, and time on a torus or a switch."""

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
"""Assumed latency from one device to the next."""


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_DEVICE_IDS = rf"(?:, device_ids=\((?:{_IOTA}|([\d,]+))\))?"
_MESH_GROUPS = rf"replica_groups=mesh\[([^\]]*)\]{_DEVICE_IDS} \{{([^}}]*)\}}"


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      kind: one of `KINDS`.
      bytes: size of the unsharded array on a device: the result of a gather, otherwise the operand.
      devices: indices of the devices in the first group; the other groups are alike.
      channel: a number that all parts of one collective share; "" if it has none.
    """

    kind: str
    bytes: int
    devices: tuple[int, ...]
    channel: str

    @property
    def size(self) -> int:
        """Number of devices in a group."""
        return len(self.devices)

    @property
    def sent(self) -> int:
        """Bytes that each device sends, if the data travels round a ring."""
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.size - 1) // self.size

    def axes(self, mesh: jax.sharding.Mesh) -> tuple[str, ...]:
        """The mesh axes over which the devices of a group differ."""
        indices = np.unravel_index(self.devices, mesh.devices.shape)
        return tuple(
            name
            for name, along in zip(mesh.axis_names, indices, strict=True)
            if len(set(along.tolist())) > 1
        )

    def seconds(self, mesh: jax.sharding.Mesh, chip: Chip) -> float:
        """Seconds on an otherwise idle network.

        On a torus a collective uses the links along every axis over which its group extends: in
        both directions if the axis is a ring, otherwise in one. Interleaved groups share the links.
        The middle of the longest ring limits an all-to-all.
        """
        if self.size == 1:
            return 0.0
        if not chip.torus:
            return self.sent / chip.link + HOP_SECONDS
        extents, rings = self._extents_on_torus(mesh, chip)
        axes = list(zip(extents, rings, strict=True))
        links = sum(2 if ring else 1 for extent, ring in axes if extent > 1)
        hops = sum(extent // 2 if ring else extent - 1 for extent, ring in axes)
        sent: float = self.sent
        bandwidth = chip.link * max(links, 1) * min(1.0, self.size / math.prod(extents))
        if self.kind == "all-to-all":
            longest = max(range(len(extents)), key=extents.__getitem__)
            sent = self.bytes * extents[longest] / 4
            bandwidth = chip.link * (2 if rings[longest] else 1)
        if self.kind == "collective-permute":
            bandwidth = chip.link
        return sent / bandwidth + max(hops, 1) * HOP_SECONDS

    def _extents_on_torus(
        self, mesh: jax.sharding.Mesh, chip: Chip
    ) -> tuple[list[int], list[bool]]:
        """How far a group extends along each axis of the torus, and whether that is a ring."""
        devices = mesh.devices.flat
        coordinates = np.array([getattr(device, "coords", (0, 0, 0)) for device in devices])
        torus = coordinates.max(0) + 1
        group = coordinates[list(self.devices)]
        extents = group.max(0) - group.min(0) + 1
        rings = wrapped(torus, chip) & (extents == torus)
        return extents.tolist(), rings.tolist()


def wrapped(extents: np.ndarray, chip: Chip) -> np.ndarray:
    """Which axes of a slice are rings.

    In two dimensions those of 16 devices; in three all axes, if each is a multiple of 4.
    """
    return extents == 16 if chip.torus == 2 else np.full(3, bool(np.all(extents % 4 == 0)))


def find(
    module: Module, computation: Computation, instruction: Instruction, devices: int
) -> list[Collective]:
    """The collectives that an instruction starts, or that a fusion contains.

    Args:
      module: the program.
      computation: the instruction's.
      instruction: any; a "-done" half has no collectives.
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
    # A TPU's reduce-scatter: an all-reduce of which each device uses a slice.
    if "all-reduce-scatter" in name:
        found = [
            Collective("reduce-scatter", part.bytes, part.devices, part.channel) for part in found
        ]
    return found


def _members(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of `replica_groups`, in any of its three formats, or of a permutation."""
    text = instruction.attributes
    permutation = instruction.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}") or ""
    if pairs := re.findall(r"\{(\d+),(\d+)\}", permutation):
        return _cycle({int(source): int(target) for source, target in pairs})
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(number) for number in found[1].split(","))
    if found := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", text):
        return tuple(_iota(*found.groups()[1:]).reshape(_integers(found[1]))[0].tolist())
    if found := re.search(_MESH_GROUPS, text):
        sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", found[1])}
        if found[2]:
            order = _iota(found[2], found[3])
        else:
            order = np.array(_integers(found[4]) if found[4] else range(devices))
        axes = re.findall(r"('[^']*')(?::\((\d+)\)(\d+))?", found[5])
        return tuple(order.ravel()[_indices_along(sizes, axes)].tolist())
    return tuple(range(devices))


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Integers from 0 in an array of these sizes, transposed by `order`."""
    numbers = np.arange(math.prod(_integers(sizes))).reshape(_integers(sizes))
    return numbers.transpose(_integers(order)) if order else numbers


def _indices_along(sizes: dict[str, int], axes: list[tuple[str, str, str]]) -> np.ndarray:
    """Device indices along axes of a mesh, or parts of axes: (name, product before, size)."""
    products = np.cumprod([1, *reversed(sizes.values())])
    strides = dict(zip(sizes, products[-2::-1].tolist(), strict=True))
    indices = np.zeros((), int)
    for name, before, size in axes:
        count = int(size) if size else sizes[name]
        stride = strides[name] * (sizes[name] // int(before or 1) // count)
        indices = np.add.outer(indices, stride * np.arange(count))
    return indices.ravel()


def _cycle(targets: dict[int, int]) -> tuple[int, ...]:
    """The cycle of a permutation that contains its first source."""
    first = next(iter(targets))
    members = [first]
    while (target := targets.get(members[-1], first)) != first:
        members.append(target)
    return tuple(members)
