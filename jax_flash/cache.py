"""Caches of keys and values for decoding, and the bookkeeping of their pages.

Lives here: `KVCache` and `PagedKVCache`, pytrees of arrays for `jit`, `scan`, donation
and sharding, and `PageAllocator`, which runs on the host and knows no arrays. What they
compute is in `decode`.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jax_flash import decode, rotary
from jax_flash._src import decode_call, page_copies, validate

__all__ = ["KVCache", "OutOfPagesError", "PageAllocator", "PageCopy", "PagedKVCache"]

C = TypeVar("C")


def _check_sizes(**sizes: Any) -> None:
    """Sizes that a cache is created with."""
    for name, size in sizes.items():
        if not validate.is_integer(size) or size < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")


def _longer(lengths: Any, k_new: Any, room: int) -> jax.Array:
    """Lengths after new tokens; negative ones stay."""
    tokens = k_new.shape[1] if len(k_new.shape) == 4 else 1
    lengths = jnp.asarray(lengths)
    if lengths.dtype != jnp.int64:
        lengths = validate.as_int32(lengths)
    # The sum alone may be beyond the largest integer.
    longer = jnp.where(lengths > room - tokens, room, lengths + tokens)
    return jnp.where(lengths < 0, lengths, longer)


def _empty(dtype: Any, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Zeros for keys and values, of a type that a cache may have."""
    try:
        # NumPy takes None for float64.
        known = None if dtype is None else str(jnp.dtype(dtype))
    except TypeError:
        known = None
    if known not in decode_call.CACHE_DTYPES:
        raise ValueError(
            f"dtype must be one of {decode_call.CACHE_DTYPES}, got {dtype!r}"
        )
    return [jnp.zeros(shape, dtype) for shape in shapes]


def _scales(cache: jax.Array, **scales: Any) -> list[jax.Array | None]:
    """A scale for each head of a cache [.., .., K, H], or None."""
    return [
        None if x is None else decode_call.canonical_scale(name, x, cache)[0]
        for name, x in scales.items()
    ]


def _exportable(cls: type[C]) -> type[C]:
    """Lets programs with such caches be serialised by `jax.export`."""
    return export.register_pytree_node_serialization(
        cls,
        serialized_name=f"jax_flash.{cls.__name__}",
        # All fields are children.
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )


class _Cache:
    """What contiguous and paged caches do alike."""

    k: Any
    v: Any
    lengths: Any
    k_scale: Any
    v_scale: Any

    @property
    def _room(self) -> int:
        """Tokens that a sequence may have."""
        raise NotImplementedError

    @property
    def _layout(self) -> dict[str, Any]:
        """How `append_kv` and `decode_mha` find and read a token."""
        # A page table, though not there, so that none is taken for an option.
        return {"page_table": None, "k_scale": self.k_scale, "v_scale": self.v_scale}

    def _with(self, k: jax.Array, v: jax.Array, k_new: Any) -> Self:
        """The cache after the tokens of `k_new` were written to `k` and `v`."""
        lengths = _longer(self.lengths, k_new, self._room)
        return dataclasses.replace(
            self,  # pyright: ignore[reportArgumentType]
            k=k,
            v=v,
            lengths=lengths,
        )

    def _append(self, k_new: Any, v_new: Any) -> Self:
        k, v = decode.append_kv(
            self.k, self.v, k_new, v_new, self.lengths, **self._layout
        )
        return self._with(k, v, k_new)

    def rope_append(
        self, query: Any, k_new: Any, v_new: Any, **options: Any
    ) -> tuple[jax.Array, Self]:
        """`append` of keys turned by `rope`, and the queries turned alike.

        Args:
          query: [B, N, H] or [B, T, N, H].
          k_new: [B, K, H] or [B, T, K, H].
          v_new: [B, K, Hv] or [B, T, K, Hv].
          **options: of `rope`.

        Returns:
          The turned query, for `attend`, and the cache with T more tokens.
        """
        query, k, v = rotary.rope_append_kv(
            query,
            k_new,
            v_new,
            self.k,
            self.v,
            self.lengths,
            **self._layout,
            **options,
        )
        return query, self._with(k, v, k_new)

    def rope_append_qkvpacked(self, qkv: Any, **options: Any) -> tuple[jax.Array, Self]:
        """`rope_append` of what one projection wrote, which the kernel reads in place.

        Args:
          qkv: [B, W] or [B, T, W] with W = N * H + K * H + K * Hv.
          **options: of `rope`.

        Returns:
          The turned query [B, N, H] or [B, T, N, H], and the cache with T more tokens.
        """
        query, k, v = rotary.rope_append_qkvpacked(
            qkv, self.k, self.v, self.lengths, **self._layout, **options
        )
        return query, self._with(k, v, query)

    def attend(self, query: Any, **options: Any) -> Any:
        """`decode_mha` of queries that stand at the last positions in the cache.

        Args:
          query: [B, N, H] or [B, T, N, H].
          **options: of `decode_mha`, but for what the cache holds.
        """
        return decode.decode_mha(
            query, self.k, self.v, self.lengths, **self._layout, **options
        )


@_exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(_Cache):
    """Keys and values of a batch of sequences, each with its own room.

    Attributes:
      k: [B, S, K, H].
      v: [B, S, K, Hv].
      lengths: int32 [B], tokens in the cache; negative: switched off.
      k_scale: float32 [K] for caches of float8_e4m3fn or int8, or None: 1.
      v_scale: the same for values.
    """

    k: Any
    v: Any
    lengths: Any
    k_scale: Any = None
    v_scale: Any = None

    @classmethod
    def create(
        cls,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: Any = jnp.bfloat16,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> Self:
        """An empty cache.

        Args:
          batch: number of sequences B.
          max_length: tokens S that a sequence has room for.
          num_kv_heads: key/value heads K.
          head_dim: key width H.
          value_dim: value width Hv, H if None.
          dtype: of keys and values: floating of 16 bits or more, float8_e4m3fn or int8.
          k_scale: floating [K] or a number, for float8_e4m3fn and int8.
          v_scale: the same for values.

        Raises:
          ValueError: an argument is wrong; the message names it and its value.
        """
        value_dim = head_dim if value_dim is None else value_dim
        _check_sizes(
            batch=batch,
            max_length=max_length,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
        )
        shape = (batch, max_length, num_kv_heads)
        k, v = _empty(dtype, (*shape, head_dim), (*shape, value_dim))
        scales = _scales(k, k_scale=k_scale, v_scale=v_scale)
        return cls(k, v, jnp.zeros((batch,), jnp.int32), *scales)

    @property
    def max_length(self) -> int:
        """Tokens that a sequence has room for."""
        return self.k.shape[-3]

    @property
    def _room(self) -> int:
        return self.max_length

    def append(self, k_new: Any, v_new: Any) -> Self:
        """The cache with T more tokens of each sequence; see `append_kv`.

        Tokens that have no room are dropped, and lengths stay within `max_length`;
        sequences of negative length are left as they are. In place under `jit` with the
        cache donated.

        Args:
          k_new: [B, K, H] or [B, T, K, H].
          v_new: [B, K, Hv] or [B, T, K, Hv].
        """
        return self._append(k_new, v_new)


@_exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache(_Cache):
    """Keys and values of sequences in pages of one pool; Kwon et al. 2023, 2309.06180.

    `PageAllocator` decides which page belongs to whom.

    Attributes:
      k: [pages, page, K, H].
      v: [pages, page, K, Hv].
      page_table: int32 [B, max_pages], the pages of each sequence in order; entries
        that are not used may be anything, and are -1 at first.
      lengths: int32 [B], tokens of each sequence; negative: switched off.
      k_scale: as in `KVCache`.
      v_scale: as in `KVCache`.
    """

    k: Any
    v: Any
    page_table: Any
    lengths: Any
    k_scale: Any = None
    v_scale: Any = None

    @classmethod
    def create(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        batch: int,
        max_pages: int,
        value_dim: int | None = None,
        dtype: Any = jnp.bfloat16,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> Self:
        """A pool of free pages and a page table of empty sequences.

        Args:
          num_pages: pages of the pool.
          page_size: tokens of a page.
          num_kv_heads: key/value heads K.
          head_dim: key width H.
          batch: number of sequences B.
          max_pages: pages that one sequence may have.
          value_dim: value width Hv, H if None.
          dtype: of keys and values: floating of 16 bits or more, float8_e4m3fn or int8.
          k_scale: floating [K] or a number, for float8_e4m3fn and int8.
          v_scale: the same for values.

        Raises:
          ValueError: an argument is wrong; the message names it and its value.
        """
        value_dim = head_dim if value_dim is None else value_dim
        _check_sizes(
            num_pages=num_pages,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            batch=batch,
            max_pages=max_pages,
            value_dim=value_dim,
        )
        shape = (num_pages, page_size, num_kv_heads)
        k, v = _empty(dtype, (*shape, head_dim), (*shape, value_dim))
        scales = _scales(k, k_scale=k_scale, v_scale=v_scale)
        table = jnp.full((batch, max_pages), -1, jnp.int32)
        return cls(k, v, table, jnp.zeros((batch,), jnp.int32), *scales)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[-3]

    @property
    def _room(self) -> int:
        return self.page_table.shape[-1] * self.page_size

    @property
    def _layout(self) -> dict[str, Any]:
        return {**super()._layout, "page_table": self.page_table}

    def append(self, k_new: Any, v_new: Any) -> Self:
        """The cache with T more tokens of each sequence; see `append_kv`.

        The page table must have the pages by then (`PageAllocator.extend`). Lengths
        stay within the page table; sequences of negative length are left as they are.

        Args:
          k_new: [B, K, H] or [B, T, K, H].
          v_new: [B, K, Hv] or [B, T, K, Hv].
        """
        return self._append(k_new, v_new)

    def copy_pages(self, source: Any, target: Any) -> Self:
        """The cache with pages copied: what copy on write asks for.

        The pairs count as copied one after the other: later ones may read or write what
        earlier ones wrote. So those of several `PageAllocator.extend` can be joined,
        whatever was freed in between, or forked, if its tokens are written by now.

        Args:
          source: integers [n], pages to read.
          target: integers [n], pages to write. A pair with a page out of range is none.

        Raises:
          ValueError: an argument is wrong; the message names it and its value.
        """
        source = page_copies.page_numbers("source", source)
        target = page_copies.page_numbers("target", target)
        if source.shape != target.shape:
            raise ValueError(
                f"target must be as long as source {source.shape}, got {target.shape}"
            )
        if not source.shape[0]:
            return self
        origin, target = page_copies.in_order(source, target, self.k.shape[0])
        # NumPy arrays, as from a checkpoint, have no `at`.
        k, v = (jnp.asarray(x) for x in (self.k, self.v))
        k, v = (x.at[target].set(x[origin], mode="drop") for x in (k, v))
        return dataclasses.replace(self, k=k, v=v)


class OutOfPagesError(RuntimeError):
    """There are not enough free pages; nothing was changed."""


class PageCopy(NamedTuple):
    """A page that must be copied before it is written to."""

    source: int
    target: int


@dataclasses.dataclass
class _Sequence:
    pages: list[int]
    length: int


class PageAllocator:
    """Who owns which page of a pool: reference counts, on the host.

    A sequence is a number. It owns as many pages as its tokens need; forks share pages
    until one of them writes (copy on write). An operation that raises changes nothing.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        _check_sizes(num_pages=num_pages, page_size=page_size)
        # Of Python, whose integers have no largest one.
        self.num_pages = int(num_pages)
        self.page_size = int(page_size)
        # Popped from the end: low pages first.
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._owners = [0] * self.num_pages
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def free_pages(self) -> int:
        """How many pages nobody owns."""
        return len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences there are, oldest first."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._sequence(sequence).length

    def pages(self, sequence: int) -> tuple[int, ...]:
        """Pages of a sequence, in order."""
        return tuple(self._sequence(sequence).pages)

    def owners(self, page: int) -> int:
        """How many sequences own a page."""
        if not validate.is_integer(page) or not 0 <= page < self.num_pages:
            raise ValueError(f"page must be in [0, {self.num_pages}), got {page!r}")
        return self._owners[page]

    def alloc(self, length: int = 0) -> int:
        """A new sequence with pages for `length` tokens.

        Returns:
          Its number, which is never used again.

        Raises:
          OutOfPagesError: there are not enough free pages.
        """
        length = _count("length", length)
        pages = self._take(self._pages_for(length))
        return self._add(pages, length)

    def extend(self, sequence: int, tokens: int) -> list[PageCopy]:
        """Makes room for `tokens` more tokens at the end of a sequence.

        Returns:
          Pages to copy (`PagedKVCache.copy_pages`) before the tokens are written: the
          last page, if it was shared and has room left.

        Raises:
          OutOfPagesError: there are not enough free pages.
        """
        tokens = _count("tokens", tokens)
        own = self._sequence(sequence)
        if not tokens:
            return []
        partly_filled = own.length % self.page_size != 0
        copies = partly_filled and self._owners[own.pages[-1]] > 1
        missing = self._pages_for(own.length + tokens) - len(own.pages)
        taken = self._take(missing + copies)
        result = []
        if copies:
            shared, fresh = own.pages[-1], taken.pop(0)
            self._release([shared])
            own.pages[-1] = fresh
            result.append(PageCopy(shared, fresh))
        own.pages += taken
        own.length += tokens
        return result

    def fork(self, sequence: int, length: int | None = None) -> int:
        """A new sequence that shares the pages of the first `length` tokens.

        Args:
          sequence: the one to share with.
          length: tokens to share, None = all. Where the last page is not full, they
            have to be written before it is copied for either sequence.

        Returns:
          The number of the new sequence. No page is taken.
        """
        own = self._sequence(sequence)
        length = own.length if length is None else length
        length = _prefix(sequence, length, own.length)
        pages = own.pages[: self._pages_for(length)]
        for page in pages:
            self._owners[page] += 1
        return self._add(pages, length)

    def free(self, sequence: int) -> None:
        """Ends a sequence; pages that nobody else owns are free again."""
        own = self._sequence(sequence)
        del self._sequences[sequence]
        self._release(reversed(own.pages))

    def truncate(self, sequence: int, length: int) -> None:
        """Forgets the tokens of a sequence behind the first `length`, such as drafts.

        Pages that nobody else owns are free again.
        """
        own = self._sequence(sequence)
        length = _prefix(sequence, length, own.length)
        kept = self._pages_for(length)
        self._release(reversed(own.pages[kept:]))
        del own.pages[kept:]
        own.length = length

    def page_table(self, sequences: Sequence[int], max_pages: int) -> np.ndarray:
        """The pages of sequences for `PagedKVCache.page_table`.

        Returns:
          int32 [len(sequences), max_pages], -1 where there is none.

        Raises:
          ValueError: a sequence has more pages than `max_pages`.
        """
        max_pages = _count("max_pages", max_pages)
        if not hasattr(sequences, "__len__"):
            raise ValueError(f"sequences must be a list of them, got {sequences!r}")
        table = np.full((len(sequences), max_pages), -1, np.int32)
        for row, sequence in enumerate(sequences):
            pages = self._sequence(sequence).pages
            if len(pages) > max_pages:
                raise ValueError(
                    f"max_pages must be at least the {len(pages)} pages of sequence "
                    f"{sequence}, got {max_pages}"
                )
            table[row, : len(pages)] = pages
        return table

    def _sequence(self, sequence: int) -> _Sequence:
        if not validate.is_integer(sequence) or sequence not in self._sequences:
            raise ValueError(f"sequence must be one that exists, got {sequence!r}")
        return self._sequences[sequence]

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _add(self, pages: list[int], length: int) -> int:
        number = self._next
        self._next += 1
        self._sequences[number] = _Sequence(pages, length)
        return number

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfPagesError(
                f"{count} pages are needed and {len(self._free)} of {self.num_pages} "
                "are free"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def _release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)


def _count(name: str, count: Any) -> int:
    if not validate.is_integer(count) or count < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {count!r}")
    return int(count)


def _prefix(sequence: int, length: Any, tokens: int) -> int:
    """A number of the first tokens of a sequence that has `tokens`."""
    count = _count("length", length)
    if count > tokens:
        raise ValueError(
            f"length must be at most the {tokens} tokens of sequence {sequence}, got "
            f"{count}"
        )
    return count
