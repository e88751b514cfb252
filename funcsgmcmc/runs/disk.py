"""The store of a record on disk: zarr, in ArviZ's groups, dimensions and coordinates.

    posterior      loss, observables and parameters of the draws        (chain, draw, …)
    sample_stats   distance, metrics, log-prior, log weight of them     (chain, draw)
    trace          loss, distance, metrics, log-prior of every step     (chain, step)
    constant_data  what estimates take beside the draws
    full_data      loss, virial, force, gradient noise on all data      (chain, full_draw)
    moments        moments of the draws, at the end of the run          (chain, …)

Values wait in memory for a block of steps or draws to be complete, and each block is written once.
A process that is killed leaves whole blocks behind, and a checkpoint holds the values that waited.

bfloat16 values are stored as float32, which holds them exactly, and compressed; other numbers are
stored in their own dtype as they are: compression would take 8 % off a float32 draw, and more time
than its step.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from funcsgmcmc import checks, tree
from funcsgmcmc.runs.processes import Processes
from funcsgmcmc.runs.store import Field, Rows

if TYPE_CHECKING:
    import numpy as np
    from zarr import Array, Group

# Bytes of a field that wait in memory, and bytes of a chunk, the unit in which a file is read.
LARGEST_BLOCK, _CHUNK = 1 << 23, 1 << 22
_MOST_PER_BLOCK = 1024

_GROUPS = ("posterior", "sample_stats", "trace", "constant_data", "full_data", "moments")
# Names of the record's own quantities and dimensions, which a parameter may have too.
_TAKEN = {"loss", "llc", "chain", "draw", "step"}


class Region(NamedTuple):
    """The chains whose values one process writes into the file.

    Attributes:
        rows: Their places among all.
        unit: Chains that no two processes share.
        processes: Those that write into the file, each its own region.
    """

    rows: slice
    unit: int
    processes: Processes


class DiskStore:
    """A store on disk.

    Args:
        path: A folder, which is made if it is missing.
        sizes: C, T and D, under the names of these dimensions.
        coordinates: The chains' indices, the steps and the draws, under the same names.
        draw_rows: Where the draws' steps stand among the steps of the run, `[D]`.
        region: The chains that are written.
        mode: `"a"` to write, `"r"` to read.

    Attributes:
        unit: Chains that the files hold together.
    """

    def __init__(
        self,
        path: Path,
        sizes: Mapping[str, int],
        coordinates: Mapping[str, Tensor],
        draw_rows: Tensor,
        region: Region,
        mode: Literal["r", "a"] = "a",
    ) -> None:
        self._root = open_group(path, mode=mode)
        self._rows, self.unit, self._processes = region
        self._sizes, self._coordinates = sizes, coordinates
        self.place_draws(draw_rows)
        self._arrays: dict[Field, Array[Any]] = {}
        self._dtypes: dict[Field, torch.dtype] = {}
        # The block of each field that waits: its index, and its values `[c, block, …]`.
        self._waiting: dict[Field, tuple[int, Tensor]] = {}

    @classmethod
    def opened(cls, path: Path, num_chains: int, plain: Mapping[str, Any]) -> "DiskStore":
        """The store of a run, to be read as it was at a checkpoint."""
        region = Region(slice(0, num_chains), num_chains, Processes())
        store = cls(path, {"chain": num_chains}, {}, torch.empty(0), region, mode="r")
        store.restore(plain, torch.device("cpu"))
        return store

    def place_draws(self, rows: Tensor) -> None:
        """Say where the draws' steps stand among the steps of the run, `[D]`."""
        self._draw_at = {int(row): draw for draw, row in enumerate(rows.tolist())}

    @staticmethod
    def tidy(path: Path, *, is_new: bool) -> None:
        """Delete what a killed process was writing: zarr writes a file, then renames it.

        Args:
            path: The folder.
            is_new: Whether a run begins: then what one left that ended before its first checkpoint
                is deleted, too.
        """
        for file in path.rglob("*.partial"):
            file.unlink()
        root = open_group(path, mode="a")
        for name in _GROUPS:
            if is_new and name in root:
                del root[name]

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Write the settings of the run, plain values, into the file."""
        self._root.attrs.update(attributes)
        self._root.require_group("posterior").attrs.update(attributes)

    def write_variables(
        self, group_name: str, variables: Mapping[str, tuple[tuple[str, ...], Tensor]]
    ) -> None:
        """Write small values beside the fields: dimensions and values by name."""
        group = self._group(group_name, "draw")
        for name, (dimensions, values) in variables.items():
            write_array(group, name, values, dimensions)

    def write(self, field: Field, rows: Rows, index: int, value: Tensor) -> None:
        """Keep the value of some chains; a block that is complete is written first."""
        draw = self._draw_at.get(index) if field.schedule == "step" else None
        if draw is not None:
            self.write(field._replace(schedule="draw"), rows, draw, value)
        if field not in self._arrays:
            # All processes come here with their first value of the field.
            self._processes.lead(lambda: self._new_array(field, value, isinstance(rows, int)))
            self._arrays[field] = self._array(field)
            self._dtypes[field] = value.dtype
        length = self._length_of_block(field)
        block, position = divmod(index, length)
        waiting = self._waiting.get(field)
        if waiting is None or waiting[0] != block:
            if waiting is None:
                values = self._new_block(field, rows, value)
            else:
                self._write_block(field, *waiting)
                # The same memory: fresh memory takes longer to touch than to fill.
                values = waiting[1]
            self._waiting[field] = waiting = (block, values)
        waiting[1][rows, position] = value

    def write_steps(self, field: Field, rows: Rows, first: int, values: Tensor) -> None:
        """Keep the values of some chains at steps that follow one another."""
        for index, value in enumerate(values, first):
            self.write(field, rows, index, value)

    def read(self, field: Field, start: int, stop: int) -> Tensor:
        """Values of this process's chains at some steps or draws; `[c, 0]` if there are none."""
        if field not in self._arrays:
            return torch.empty(self._num_chains, 0)
        block, waiting = self._waiting[field]
        first = block * self._length_of_block(field)
        stop_here = max(start, min(stop, first))
        stored = torch.as_tensor(self._arrays[field][self._rows, start:stop_here])
        parts = [stored.to(self._dtypes[field])]
        if stop > first:
            parts.append(waiting[:, max(start - first, 0) : stop - first].cpu())
        return torch.cat(parts, 1)

    def fields(self, group: str) -> list[Field]:
        """The fields of a group that have values."""
        # Those of the draws' steps are copies.
        copies = {
            field._replace(schedule="draw") for field in self._arrays if field.schedule == "step"
        }
        return [field for field in self._arrays if field.group == group and field not in copies]

    def plain(self, *, is_written: bool = False) -> dict[str, Any]:
        """The fields, and the blocks that wait, as plain values for a checkpoint.

        Args:
            is_written: Whether `write_waiting` has put these blocks into the file.
        """
        return {
            "fields": [[list(field), str(self._dtypes[field])] for field in self._arrays],
            "waiting": [
                [list(field), block, None if is_written else values.cpu().clone()]
                for field, (block, values) in self._waiting.items()
            ],
        }

    def restore(self, plain: Mapping[str, Any], device: torch.device) -> None:
        """Take what `plain` gave when a checkpoint was made.

        Args:
            plain: It.
            device: Where values of each step are kept.
        """
        for listed, dtype in plain["fields"]:
            field = _field(listed)
            self._arrays[field] = self._array(field)
            self._dtypes[field] = getattr(torch, dtype.removeprefix("torch."))
        for listed, block, values in plain["waiting"]:
            field = _field(listed)
            place = device if field.schedule == "step" else torch.device("cpu")
            values = self._read_block(field, block) if values is None else values
            self._waiting[field] = (block, values.to(place))

    def resize(self, plain: Mapping[str, Any]) -> None:
        """Give arrays and coordinates the lengths of this run, which may be longer than before.

        Args:
            plain: As for `restore`, which comes after.
        """
        for listed, _ in plain["fields"]:
            field = _field(listed)
            array = self._array(field)
            self._group(place_of(field)[0], field.schedule)
            size = self._sizes[field.schedule]
            if array.shape[1] != size:
                array.resize((array.shape[0], size, *array.shape[2:]))

    def write_waiting(self) -> None:
        """Write the blocks that wait, complete or not; they go on waiting."""
        for field, (block, values) in self._waiting.items():
            self._write_block(field, block, values)

    def trim(self, num_steps: int, num_draws: int, num_looks: int) -> None:
        """Cut arrays and coordinates to the steps, draws and looks that were made."""
        lengths = {"step": num_steps, "draw": num_draws, "full_draw": num_looks}
        for _, group in self._root.groups():
            for _, array in group.arrays():
                names: Any = getattr(array.metadata, "dimension_names", None) or ()
                shape = tuple(
                    lengths.get(name, size) for name, size in zip(names, array.shape, strict=True)
                )
                if shape != array.shape:
                    array.resize(shape)

    def consolidate(self) -> None:
        """Gather the metadata in one place, from which other programs open the file at once."""
        import zarr

        with warnings.catch_warnings():
            # They are no part of the format's third version yet, and xarray asks for them.
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(self._root.store)

    def _read_block(self, field: Field, block: int) -> Tensor:
        """A block of a file, as it waits in memory: its last part may not be there yet."""
        array, length = self._arrays[field], self._length_of_block(field)
        known = torch.as_tensor(array[self._rows, block * length : (block + 1) * length])
        values = known.new_zeros((known.shape[0], length, *known.shape[2:]))
        values[:, : known.shape[1]] = known
        return values.to(self._dtypes[field])

    def _new_block(self, field: Field, rows: Rows, value: Tensor) -> Tensor:
        """Memory for a block of values like one of some chains."""
        shape = value.shape if isinstance(rows, int) else value.shape[1:]
        return torch.empty(
            (self._num_chains, self._length_of_block(field), *shape),
            dtype=value.dtype,
            # No step waits for a copy from its device; draws are large.
            device=value.device if field.schedule == "step" else "cpu",
        )

    def _write_block(self, field: Field, block: int, values: Tensor) -> None:
        array = self._arrays[field]
        first = block * values.shape[1]
        length = min(values.shape[1], self._sizes[field.schedule] - first)
        array[self._rows, first : first + length] = to_numpy(values[:, :length])

    @property
    def _num_chains(self) -> int:
        """Chains of this process."""
        return self._rows.stop - self._rows.start

    def _array(self, field: Field) -> "Array[Any]":
        """The array of a field, as it is on disk."""
        array: Any = self._root["/".join(place_of(field))]
        return array

    def _length_of_block(self, field: Field) -> int:
        return self._arrays[field].chunks[1]

    def _new_array(self, field: Field, value: Tensor, is_one_chain: bool) -> None:
        """Make the array of a field for values like this one."""
        group_name, name = place_of(field)
        group = self._group(group_name, field.schedule)
        num_chains, size = self._sizes["chain"], self._sizes[field.schedule]
        item = tuple(value.shape if is_one_chain else value.shape[1:])
        kind = to_numpy(value.reshape(-1)[:1]).dtype
        bytes_each = max(1, math.prod(item) * kind.itemsize)
        # Long blocks of few chains, so that a chain and a draw are both read from few chunks.
        # Of even sizes: the last chunk takes the room of a whole one.
        bytes_of_all = bytes_each * self._num_chains
        length = _even(size, min(LARGEST_BLOCK // bytes_of_all, _MOST_PER_BLOCK))
        chains = _CHUNK // (bytes_each * length)
        chains = max(n for n in range(1, min(self.unit, max(1, chains)) + 1) if self.unit % n == 0)
        names = [f"{name}_dim_{i}" for i in range(len(item))]
        if field.group == "observables":  # their entries are examples and tokens, to be picked
            for entries, number in zip(names, item, strict=True):
                write_array(group, entries, torch.arange(number), (entries,))
        group.create_array(
            name,
            shape=(num_chains, size, *item),
            chunks=(chains, length, *(max(1, each) for each in item)),
            dtype=kind,
            fill_value=math.nan if kind.kind == "f" else 0,
            dimension_names=(*field.dimensions, *names),
            compressors="auto" if value.dtype == torch.bfloat16 else None,
            # One that was made after the checkpoint is made again.
            overwrite=True,
            # Looking for chunks that hold fill values alone takes a pass over each.
            config={"write_empty_chunks": True},
        )

    def _group(self, name: str, schedule: str) -> "Group":
        """Make a group, with its coordinates."""
        group = self._root.require_group(name)
        for dimension in ("chain", schedule):
            write_array(group, dimension, self._coordinates[dimension], (dimension,))
        return group


def place_of(field: Field) -> tuple[str, str]:
    """The group and the name of a field in the file."""
    name = tree.dotted(field.name)
    if field.schedule == "step":
        return "trace", name
    if field.schedule == "full_draw":
        return "full_data", name
    if field.group == "loss":
        return "posterior", name
    if field.group == "draws" and name in _TAKEN:
        return "posterior", f"params.{name}"
    if field.group in ("draws", "observables"):
        return "posterior", name
    return "sample_stats", name


def _even(size: int, most: int) -> int:
    """The length of as few parts of a size as are of at most some length, and all of one."""
    return math.ceil(size / math.ceil(size / max(1, min(most, size))))


def _field(listed: list[Any]) -> Field:
    """A field of its plain form."""
    group, name, schedule = listed
    return Field(group, name if isinstance(name, str) else tuple(name), schedule)


def write_array(group: "Group", name: str, values: Tensor, dimensions: tuple[str, ...]) -> None:
    """Write a small array, in place of an earlier one of that name."""
    data = to_numpy(values)
    if name in group:
        array: Any = group[name]
        if array.shape != data.shape:
            array.resize(data.shape)
        array[...] = data
        return
    array = group.create_array(name, shape=data.shape, dtype=data.dtype, dimension_names=dimensions)
    array[...] = data


def to_numpy(values: Tensor) -> "np.ndarray[Any, Any]":
    """The values as NumPy has them: bfloat16 becomes float32."""
    return (values.float() if values.dtype == torch.bfloat16 else values).detach().cpu().numpy()


def open_group(path: Path, mode: Literal["r", "a"]) -> "Group":
    """Open a group of zarr, version 3 of the format.

    Raises:
        ImportError: The extra `store` is not installed.
    """
    try:
        import zarr
    except ImportError as error:
        raise checks.missing_extra("store", "zarr", "store=") from error
    # What is consolidated may be older than the arrays.
    return zarr.open_group(path, mode=mode, zarr_format=3, use_consolidated=False)
