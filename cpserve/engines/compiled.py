"""What the engines that run a bundle share: its graphs by name, each built once for the shapes that it serves.

A subclass says what its library makes of a graph. Adapters never cause a build, and `builds` counts them all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cpserve.at_once import CELLS, PIXELS, most
from cpserve.bundle import read_bundle
from cpserve.engine import Engine
from cpserve.errors import EngineError

Runner = Callable[..., Callable[[], Tensor]]
"""Begins with a graph's inputs; what it returns waits for the output."""
Shape = tuple[int, ...]
ANY: Shape = ()  # of a graph that was built for every shape


class CompiledEngine(Engine):
    """Opens each graph when it is first needed.

    `rows` are the row counts that graphs are built for, ascending (none: any); a call is cut into slices of those, or of what
    memory has room for, so a call may have any number of rows. `streams` is how many slices run at the same time.
    """

    rows: Shape = ()
    streams: int = 1

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """`threads` is how many a graph may use (None: as many as there are cores).

        Raises:
            EngineError: the folder is no sound bundle, or the library that runs it is not installed.
        """
        self.bundle = read_bundle(path)
        super().__init__(self.bundle.spec)
        self.signature, recipe = self.bundle.signature, self.bundle.manifest.recipe
        self.slopes = recipe.slopes
        self.merged = "+".join(f"{each.sha256[:12]}:{each.scale:g}" for each in recipe.merged)
        self.threads = threads
        self.builds: Counter[str] = Counter()
        self._runners: dict[tuple[str, Shape, int], Runner] = {}
        try:
            self._load()  # a missing library is reported now, not at the first picture
        except EngineError:
            super().close()
            raise

    @abstractmethod
    def _load(self) -> None:
        """Import the library.

        Raises:
            EngineError: it is not installed, or cannot run here.
        """

    @abstractmethod
    def _build(self, graph: str, shape: Shape, streams: int) -> Runner:
        """What runs `graph` on tensors; its first input has `shape`, or any.

        So many `streams` may be begun before the first is waited for.
        """

    def infer(self, latents: Tensor, timestep: Tensor, kv_bank: Tensor, slot: Tensor, *added: Tensor) -> Tensor:
        return self._by_rows(
            "unet", CELLS, [latents, timestep, slot, *added], lambda z, t, s, *a: (z, t, kv_bank, s, *a)
        )

    def infer_slopes(self, rows: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        outputs = []
        for cut in turns(len(rows), (1,), self.streams):
            runner = self._runner("kv_slope", ANY, len(cut))
            outputs += [output() for output in [runner(*row) for each in cut for row in rows[each]]]
        return outputs

    def encode_text(self, ids: Tensor, extra: Tensor) -> Tensor:
        return self._runner("text_encoder", ANY)(ids, extra)()

    def encode_pictures(self, pictures: Tensor) -> Tensor:
        return self._by_rows("vae_encoder", PIXELS, [pictures])

    def decode(self, latents: Tensor) -> Tensor:
        return self._by_rows("vae_decoder", PIXELS // self.spec.vae_factor**2, [latents])

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """torch does little between two calls, and its threads would wait for more on the cores that the graphs need."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def close(self) -> None:
        super().close()
        self._runners.clear()

    def _by_rows(
        self,
        graph: str,
        cells: int,
        inputs: Sequence[Tensor],
        arranged: Callable[..., tuple[Tensor, ...]] = lambda *rows: rows,
    ) -> Tensor:
        """A graph on slices of row-wise inputs, of some `cells` of the first one where `rows` are free; `arranged` makes the
        graph's inputs of a slice.
        """
        parts, counts = [], self.rows or (most(cells, inputs[0]),)
        for cut in turns(len(inputs[0]), counts, self.streams):
            given = [[filled(x[rows], self.rows) for x in inputs] for rows in cut]
            runner = self._runner(graph, tuple(given[0][0].shape) if self.rows else ANY, len(cut))
            outputs = [output() for output in [runner(*arranged(*part)) for part in given]]
            parts += [output[: rows.stop - rows.start] for rows, output in zip(cut, outputs, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _runner(self, graph: str, shape: Shape, streams: int = 1) -> Runner:
        self.check_open()
        key = (graph, shape, streams)
        if key not in self._runners:
            self._runners[key] = self._build(*key)
            self.builds[graph] += 1
        return self._runners[key]


def turns(rows: int, fixed: Shape, streams: int = 1) -> Iterator[list[slice]]:
    """`rows` cut into slices, and which of them run at the same time, one a stream: equal ones, lest a stream waits, of the largest
    of the `fixed` counts (ascending) that all of them reach. The last rows may be too few for all streams, and where one of
    the counts is all that is left and cannot be shared evenly, one slice has all cores.

    With 1 among the counts, which more than one stream needs, no row is computed in vain.
    """
    start = 0
    while start < rows:
        left = rows - start
        at_once = 1 if left in fixed and left % streams else min(streams, left)
        count = max((n for n in fixed if n * at_once <= left), default=left)
        stop = start + at_once * count
        yield [slice(i, i + count) for i in range(start, stop, count)]
        start = stop


def filled(rows: Tensor, fixed: Shape) -> Tensor:
    """A slice made as long as the least of the `fixed` counts by repeating its last row."""
    missing = fixed[0] - len(rows) if fixed else 0
    return rows if missing <= 0 else torch.cat([rows, rows[-1:].repeat_interleave(missing, 0)])
