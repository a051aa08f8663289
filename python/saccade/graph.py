"""`Graph`: which query attends to which key, as edges. CSR by query; the other forms are built once, when
first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import graph_forms
from .checks import as_int, is_int
from .graph_forms import rows_of
from .kernels.config import ITEM
from .maskbase import Dims, Index, Mask, set_fields, untraced

_MANY_TILES = 1 << 17  # 64 MiB of bits
MAKING = "a Graph made from the values of tensors: make it before, and .prepare() it"


class Graph(Mask):
    """Edges from keys (sources) to queries (targets). They hold for every batch entry and head.

    A repeated edge counts as often as it stands. Edges are numbered in the order in which they were given:
    that is the order of `edge_index`, of `edge_bias` and of `edge_attr`.
    """

    __slots__ = (
        "indptr",
        "indices",
        "edge_ids",
        "num_queries",
        "num_keys",
        "num_edges",
        "has_repeats",
        "_cache",
    )

    indptr: Tensor  # [Sq + 1] int64
    indices: Tensor  # [E] keys of the edges, by query, then by key; int32 where they fit
    edge_ids: Tensor | None  # [E] int64: number of each edge as given; None where the order is the same
    num_queries: int
    num_keys: int
    num_edges: int  # edges as given: the length of edge_bias
    has_repeats: bool
    _cache: dict[str, Any]

    def __init__(
        self,
        indptr: Tensor,
        indices: Tensor,
        edge_ids: Tensor | None,
        num_keys: int,
        num_edges: int,
        has_repeats: bool | None = None,
    ) -> None:
        rows = rows_of(indptr, indices.numel())
        if has_repeats is None:
            has_repeats = bool(((rows[1:] == rows[:-1]) & (indices[1:] == indices[:-1])).any())
        set_fields(
            self, indptr=indptr, indices=indices, edge_ids=edge_ids, num_keys=num_keys, num_edges=num_edges
        )
        set_fields(self, num_queries=indptr.numel() - 1, has_repeats=has_repeats, _cache={"rows": rows})

    # -- making one
    # ---------------------------------------------------------------------------------------------

    @staticmethod
    @untraced(MAKING)
    def from_edge_index(edge_index: Tensor, num_nodes: int | tuple[int, int]) -> Graph:
        """`edge_index` [2, E] ints: row 0 the source (key), row 1 the target (query), as in PyTorch
        Geometric.

        `num_nodes` is an int or `(num_sources, num_targets)`. Raises ValueError for an index out of range.
        """
        if not isinstance(edge_index, Tensor):
            raise TypeError(f"edge_index: expected a tensor [2, E], got {type(edge_index).__name__}")
        if edge_index.dim() != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"edge_index: expected shape [2, E], got {list(edge_index.shape)}")
        _check_index_dtype("edge_index", edge_index)
        num_keys, num_queries = _sizes(num_nodes)
        keys, queries = edge_index.detach().long().unbind(0)
        _check_range("edge_index[0] (sources)", keys, num_keys)
        _check_range("edge_index[1] (targets)", queries, num_queries)
        return _from_pairs(queries, keys, num_queries, num_keys)

    @staticmethod
    @untraced(MAKING)
    def from_csr(indptr: Tensor, indices: Tensor, num_keys: int) -> Graph:
        """Row i of the CSR matrix [Sq, num_keys] holds the keys of query i: `indices[indptr[i]:indptr[i +
        1]]`.
        """
        for name, value in (("indptr", indptr), ("indices", indices)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
            _check_index_dtype(name, value)
            if value.dim() != 1:
                raise ValueError(f"{name}: expected one dimension, got shape {list(value.shape)}")
        num_keys, _ = _sizes(num_keys, "num_keys", "an int")
        indptr, indices = indptr.detach().long(), indices.detach().long()
        if indptr.numel() == 0 or indptr.device != indices.device:
            raise ValueError("indptr: expected at least one entry, on the device of indices")
        if int(indptr[0]) != 0 or int(indptr[-1]) != indices.numel() or bool((indptr.diff() < 0).any()):
            raise ValueError(f"indptr: expected to rise from 0 to {indices.numel()} (the number of indices)")
        _check_range("indices", indices, num_keys)
        return _from_pairs(rows_of(indptr, indices.numel()), indices, indptr.numel() - 1, num_keys)

    @staticmethod
    @untraced(MAKING)
    def from_dense(mask: Tensor) -> Graph:
        """`mask` [Sq, Sk] bool (True = keep), or a sparse COO/CSR tensor of that shape whose entries are the
        edges.

        Edges are numbered row by row; those of a COO tensor in the order of its indices.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a tensor [Sq, Sk], got {type(mask).__name__}")
        if mask.dim() != 2:
            raise ValueError(f"mask: expected shape [Sq, Sk], got {list(mask.shape)}")
        if mask.layout == torch.sparse_csr:
            return Graph.from_csr(mask.crow_indices(), mask.col_indices(), mask.shape[1])
        if mask.layout == torch.sparse_coo:
            return Graph.from_edge_index(mask._indices().flip(0), (mask.shape[1], mask.shape[0]))
        if mask.dtype != torch.bool:
            raise ValueError(f"mask: expected dtype torch.bool, got {mask.dtype}")
        rows, keys = mask.detach().nonzero(as_tuple=True)
        return _from_pairs(rows, keys, mask.shape[0], mask.shape[1])

    @staticmethod
    def batch(graphs: Sequence[Graph]) -> Graph:
        """The block-diagonal graph: nodes and edges of each graph after those of the one before."""
        graphs = list(graphs)
        if not graphs or not all(isinstance(g, Graph) for g in graphs):
            raise TypeError("graphs: expected a sequence of at least one Graph")
        edges, keys, queries = [], 0, 0
        for g in graphs:
            edges.append(g.edge_index + torch.tensor([[keys], [queries]], device=g.indptr.device))
            keys, queries = keys + g.num_keys, queries + g.num_queries
        return Graph.from_edge_index(torch.cat(edges, 1), (keys, queries))

    @staticmethod
    def intersect(graphs: list[Graph]) -> Graph:
        """The edges of the first graph whose pair all the others have. They keep the first one's numbers, and
        so its edge_bias and edge_attr.
        """
        first = graphs[0]
        if any((g.num_queries, g.num_keys) != (first.num_queries, first.num_keys) for g in graphs):
            raise ValueError(f"mask: expected graphs of one size, got {' & '.join(map(repr, graphs))}")
        return first if len(graphs) == 1 else Graph._shared_edges(graphs)

    @staticmethod
    @untraced("the edges that several graphs share: join them with & before, and .prepare() the result")
    def _shared_edges(graphs: list[Graph]) -> Graph:
        first = graphs[0]
        kept = torch.ones_like(first.rows, dtype=torch.bool)
        for other in graphs[1:]:
            kept &= other.keep(0, 0, first.rows, first.indices.long(), other.num_queries, other.num_keys)
        counts = torch.zeros_like(first.indptr)
        counts.index_add_(0, first.rows[kept] + 1, torch.ones_like(first.rows[kept]))
        ids = first.ids[kept]
        return Graph(counts.cumsum(0), first.indices[kept], ids, first.num_keys, first.num_edges)

    # -- looking at one
    # -----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.indptr.device

    @property
    def graph(self) -> Graph:
        return self

    @property
    def rows(self) -> Tensor:
        """[E] int64: the query of each stored edge, beside `indices`."""
        return self._cache["rows"]

    @property
    def ids(self) -> Tensor:
        """[E] int64: the number of each stored edge as it was given."""
        if self.edge_ids is None:
            return torch.arange(self.indices.numel(), device=self.device)
        return self.edge_ids

    @property
    def edge_index(self) -> Tensor:
        """[2, E] int64: sources and targets in the order in which they were given."""
        stored = torch.stack([self.indices.long(), self.rows])
        return stored if self.edge_ids is None else stored[:, self.edge_ids.argsort()]

    def keep(self, b: Index, h: Index, i: Tensor, j: Tensor, sq: Index, sk: Index) -> Tensor:
        pairs = self._once("pairs", lambda: self.rows * self.num_keys + self.indices)  # ascending
        wanted = i * self.num_keys + j
        if pairs.numel() == 0:
            return torch.zeros_like(wanted, dtype=torch.bool)
        found = torch.searchsorted(pairs, wanted.contiguous()).clamp_(max=pairs.numel() - 1)
        return pairs[found] == wanted

    def check(self, dims: Dims) -> None:
        if (self.num_queries, self.num_keys) != (dims.seqlen_q, dims.seqlen_k):
            raise ValueError(
                f"mask: {self!r} is for {self.num_queries} queries and {self.num_keys} keys, "
                f"the call has {dims.seqlen_q} and {dims.seqlen_k}"
            )

    def materialize(self, seqlen_q: int | None = None, seqlen_k: int | None = None) -> Tensor:
        """The dense boolean [Sq, Sk]; the sizes are the graph's own unless given."""
        sq = self.num_queries if seqlen_q is None else seqlen_q
        return super().materialize(sq, self.num_keys if seqlen_k is None else seqlen_k)

    # -- other forms
    # --------------------------------------------------------------------------------------------

    def transpose(self) -> Graph:
        """Queries and keys exchanged; edges keep their numbers."""
        return self._once(
            "transpose",
            lambda: Graph.from_edge_index(self.edge_index.flip(0), (self.num_queries, self.num_keys)),
        )

    def to(self, device: torch.device | str) -> Graph:
        """The same graph on `device`."""
        indptr = self.indptr.to(device)
        if indptr is self.indptr:  # "cuda" is the current one of them
            return self
        ids = None if self.edge_ids is None else self.edge_ids.to(device)
        indices = self.indices.to(device)
        return Graph(indptr, indices, ids, self.num_keys, self.num_edges, self.has_repeats)

    def add_self_loops(self) -> Graph:
        """Adds the missing edges (i, i), after the existing ones. Needs as many keys as queries."""
        if self.num_queries != self.num_keys:
            raise ValueError(
                f"add_self_loops: needs as many keys as queries, got {self.num_keys} and {self.num_queries}"
            )
        edges = self.edge_index
        missing = torch.ones(self.num_queries, dtype=torch.bool, device=self.device)
        missing[edges[0, edges[0] == edges[1]]] = False
        loops = missing.nonzero().squeeze(1)
        return Graph.from_edge_index(torch.cat([edges, loops.expand(2, -1)], 1), self.num_keys)

    def reorder(self) -> tuple[Graph, Tensor]:
        """(graph, order): the same graph with its nodes numbered so that neighbours lie close together in
        memory, and `order` [N] int64, the old number of each node. Edges keep their numbers.

        Reverse Cuthill-McKee. `x[order]` are the features to go with it,
        and `out[order.argsort()]` the outputs in the old order: those of the old graph, but for the order of
        sums (and for dropout, whose pattern follows the numbers). It pays where the numbers of neighbours say
        nothing yet and keys and values do not fit in the cache. Needs as many keys as queries.
        """
        if self.num_queries != self.num_keys:
            raise ValueError(
                f"reorder: needs as many keys as queries, got {self.num_keys} and {self.num_queries}"
            )
        from .locality import cuthill_mckee  # needed here alone

        edges = self.edge_index
        order = cuthill_mckee(edges[0].cpu(), edges[1].cpu(), self.num_keys).to(self.device)
        place = torch.empty_like(order)
        place[order] = torch.arange(self.num_keys, device=self.device)
        return Graph.from_edge_index(place[edges], self.num_keys), order

    def prepare(self) -> Graph:
        """Builds the cached forms now, so that compiled and captured calls find them. Returns the graph
        itself.

        Tiles are among them unless they would be many and nearly empty (above 64 MiB, with fewer than 8 edges
        each): no rule chooses such tiles, but for a graph with `bias`, `rel_bias` or `bias_k`; make that
        call once before.
        """
        self.transpose()
        self.columns()
        if not self.has_repeats and 0 < self.num_tiles <= max(_MANY_TILES, self.indices.numel() // 8):
            self.tiles()
            for whole in (False, True):
                self.tile_lists(whole)
        for by_key in (False, True):
            self.work(ITEM, by_key)
        self.column_ids()
        self.keep(0, 0, self.rows[:1], self.indices[:1].long(), self.num_queries, self.num_keys)
        self.pairs()
        self._cache["prepared"] = True
        return self

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` was called."""
        return "prepared" in self._cache

    def pairs(self) -> Tensor:
        """`edge_index`, kept: not to be written to."""
        return self._once("edge_index", lambda: self.edge_index)

    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """CSR by key: indptr [Sk + 1] int64, the query of each edge [E] int32, its place in the CSR by query
        [E].
        """
        return self._once("columns", lambda: graph_forms.columns(self.indices, self.rows, self.num_keys))

    def work(self, limit: int, by_key: bool) -> list[Tensor]:
        """The edges of each row (or key) in pieces of at most `limit`, the longest first, so that a hub is
        shared and leaves stay cheap.

        Returns the row, first edge and last edge of each piece [P], its number among the pieces of rows that
        were cut, or -1 [P]; then the rows that were cut [C] and where the pieces of each begin [C + 1].
        int32, but for edges, int64.
        """
        indptr = self.columns()[0] if by_key else self.indptr
        return self._once(f"work {limit} {by_key}", lambda: graph_forms.work(indptr, limit))

    def column_ids(self) -> Tensor:
        """[E] int64: the user's number of each edge, in the order of `columns`."""
        return self._once("column ids", lambda: self.ids[self.columns()[2]])

    @property
    def num_tiles(self) -> int:
        """How many 64 x 64 tiles hold an edge."""
        return self._once("num_tiles", lambda: graph_forms.num_tiles(self.rows, self.indices, self.num_keys))

    def tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        """Tile form: CSR over the 64 x 64 tiles that hold an edge, one bit per pair. Only without repeated
        edges.

        Returns tile_ptr [ceil(Sq / 64) + 1] int64, tile_col [T] int32, tile_bits [T, 64] int64 (word = query
        row, bit c = key column).
        """
        if self.has_repeats:
            raise ValueError("tiles: a graph with repeated edges has no tile form")
        size = self.num_queries, self.num_keys
        return self._once("tiles", lambda: graph_forms.tiles(self.rows, self.indices, size))

    def tile_lists(self, whole: bool) -> list[Tensor]:
        """The tile form for kernels that go through a row's tiles, or a column's, the whole ones first.

        `whole`: a tile with every bit set needs no test (nothing but the graph masks). Returns tile_bits
        [T, 64]; then by row and again by column: pointers [tiles + 1] int32, where each one's whole tiles end
        [tiles] int32, the other coordinate of each tile [T] int32, its number in tile_bits [T] int32.
        """
        tiles = self.tiles()
        return self._once(f"tile_lists {whole}", lambda: graph_forms.tile_lists(tiles, self.num_keys, whole))

    def _once(self, name: str, build: Callable[[], Any]) -> Any:
        if name not in self._cache:
            self._fill(name, build)
        return self._cache[name]

    @untraced("forms of a Graph: call .prepare() on the mask, or this function once, before")
    def _fill(self, name: str, build: Callable[[], Any]) -> None:
        self._cache[name] = build()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cache": {"rows": self.rows}}

    def __repr__(self) -> str:
        return f"Graph({self.num_queries} queries, {self.num_keys} keys, {self.num_edges} edges)"


def _from_pairs(queries: Tensor, keys: Tensor, num_queries: int, num_keys: int) -> Graph:
    pairs, order = torch.sort(queries * num_keys + keys, stable=True)
    sorted_already = bool((order.diff() > 0).all())
    counts = torch.zeros(num_queries + 1, dtype=torch.int64, device=keys.device)
    counts.index_add_(0, queries + 1, torch.ones_like(queries))
    dtype = torch.int32 if num_keys <= torch.iinfo(torch.int32).max else torch.int64
    indices = (keys if sorted_already else keys[order]).to(dtype, copy=True)  # never the caller's memory
    ids = None if sorted_already else order
    return Graph(counts.cumsum(0), indices.contiguous(), ids, num_keys, pairs.numel())


def _sizes(
    num_nodes: Any, name: str = "num_nodes", wanted: str = "an int or (num_sources, num_targets)"
) -> tuple[int, int]:
    sizes = tuple(num_nodes) if isinstance(num_nodes, tuple | list) else (num_nodes, num_nodes)
    if len(sizes) != 2 or not all(map(is_int, sizes)):
        raise TypeError(f"{name}: expected {wanted}, got {num_nodes!r}")
    if min(sizes) < 0:
        raise ValueError(f"{name}: expected sizes >= 0, got {num_nodes!r}")
    return as_int(sizes[0]), as_int(sizes[1])


def _check_index_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"{name}: expected an integer dtype, got {value.dtype}")


def _check_range(name: str, values: Tensor, size: int) -> None:
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= size):
        raise ValueError(
            f"{name}: expected 0 <= index < {size}, got {int(values.min())} to {int(values.max())}"
        )
