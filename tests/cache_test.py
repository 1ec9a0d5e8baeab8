"""The caches as pytrees, and the invariants of the page allocator."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import KVCache, OutOfPagesError, PageAllocator, PagedKVCache, mha

BATCH, HEADS, KV_HEADS, WIDTH, STEPS = 3, 4, 2, 8, 7


def tokens(steps: int = STEPS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value of each step."""
    rng = np.random.default_rng(0)
    shapes = (HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, WIDTH)
    query, key, value = (
        rng.standard_normal((steps, BATCH, *shape), np.float32) for shape in shapes
    )
    return query, key, value


def caches() -> list[Any]:
    """An empty cache of each kind, with room for all steps."""
    allocator = PageAllocator(20, 2)
    numbers = [allocator.alloc(STEPS) for _ in range(BATCH)]
    pages = PagedKVCache.create(
        20, 2, KV_HEADS, WIDTH, batch=BATCH, max_pages=5, dtype=jnp.float32
    )
    pages = dataclasses.replace(pages, page_table=allocator.page_table(numbers, 5))
    return [KVCache.create(BATCH, 10, KV_HEADS, WIDTH, dtype=jnp.float32), pages]


@pytest.mark.parametrize("kind", [0, 1])
def test_scan_equals_attention_to_all_at_once(kind: int) -> None:
    cache = caches()[kind]

    @jax.jit
    def generate(cache: Any, steps: Any) -> Any:
        def step(cache: Any, x: Any) -> Any:
            query, key, value = x
            cache = cache.append(key, value)
            return cache, cache.attend(query)

        return jax.lax.scan(step, cache, steps)

    steps = tokens()
    cache, outs = generate(cache, steps)
    assert (np.asarray(cache.lengths) == STEPS).all()
    query, key, value = (np.swapaxes(x, 0, 1) for x in steps)
    want = mha(query, key, value, is_causal=True)
    assert_close(np.swapaxes(np.asarray(outs), 0, 1), want)
    # The same in chunks: a prefill of 5 tokens, then 2.
    cache = caches()[kind]
    for part in (slice(0, 5), slice(5, 7)):
        cache = cache.append(key[:, part], value[:, part])
        assert_close(cache.attend(query[:, part]), want[:, part])


@pytest.mark.parametrize("kind", [0, 1])
def test_donated_cache_stays_in_its_memory(kind: int) -> None:
    cache = jax.tree.map(jnp.asarray, caches()[kind])
    step = jax.jit(lambda cache, k, v: cache.append(k, v), donate_argnums=0)
    _, key, value = tokens()
    addresses = [x.unsafe_buffer_pointer() for x in (cache.k, cache.v)]
    for i in range(3):
        cache = step(cache, key[i], value[i])
    assert [x.unsafe_buffer_pointer() for x in (cache.k, cache.v)] == addresses


@pytest.mark.parametrize("kind", [0, 1])
def test_heads_on_a_mesh(kind: int) -> None:
    cache = jax.tree.map(jnp.asarray, caches()[kind])
    mesh = Mesh(np.array(jax.devices()[:2]), ("heads",))
    by_heads = NamedSharding(mesh, P(None, None, "heads"))
    whole = NamedSharding(mesh, P())
    shardings = jax.tree.map(lambda x: by_heads if x.ndim == 4 else whole, cache)
    placed = jax.device_put(cache, shardings)

    def step(cache: Any, query: Any, key: Any, value: Any) -> Any:
        cache = cache.append(key, value)
        return cache, cache.attend(query)

    inputs = [x[0] for x in tokens()]
    want = step(cache, *inputs)[1]
    inputs = jax.device_put(inputs, NamedSharding(mesh, P(None, "heads")))
    compiled = jax.jit(step, donate_argnums=0).lower(placed, *inputs).compile()
    text = str(compiled.as_text())
    assert "all-gather" not in text
    assert "all-reduce" not in text
    got, out = compiled(placed, *inputs)
    assert got.k.sharding.is_equivalent_to(by_heads, 4)
    assert_close(out, want)


@pytest.mark.parametrize("kind", [0, 1])
def test_exported_step(kind: int) -> None:
    """A program that takes and returns a cache, through bytes."""
    cache = caches()[kind]
    query, key, value = (x[0] for x in tokens(1))

    @jax.jit
    def step(cache: Any, query: Any, key: Any, value: Any) -> Any:
        cache = cache.append(key, value)
        return cache, cache.attend(query)

    exported = jax.export.export(step)(cache, query, key, value)
    loaded = jax.export.deserialize(exported.serialize())
    got, want = (f(cache, query, key, value) for f in (loaded.call, step))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_close(got, want)


def test_layers_are_scanned() -> None:
    """A cache of several layers is a cache with a leading dimension."""
    one = KVCache.create(BATCH, 4, KV_HEADS, WIDTH, dtype=jnp.float32)
    layers = jax.tree.map(lambda x: jnp.stack([x, x]), one)
    query, key, value = (x[:2] for x in tokens())

    def layer(carry: Any, x: Any) -> Any:
        cache, q, k, v = x
        cache = cache.append(k, v)
        return carry, (cache, cache.attend(q))

    _, (layers, outs) = jax.lax.scan(layer, 0, (layers, query, key, value))
    assert layers.k.shape == (2, BATCH, 4, KV_HEADS, WIDTH)
    # One key: its value.
    assert_close(outs, jnp.repeat(value, HEADS // KV_HEADS, 2))


@pytest.mark.parametrize("kind", [0, 1])
def test_full_and_inactive(kind: int) -> None:
    empty, room = caches()[kind], 10
    _, key, value = (np.swapaxes(x, 0, 1) for x in tokens())
    for full in (room, 2**31 - 1):
        lengths = jnp.array([room - 1, full, -1], jnp.int32)
        cache = dataclasses.replace(empty, lengths=lengths).append(key, value)
        np.testing.assert_array_equal(cache.lengths, [room, room, -1])


@pytest.mark.parametrize("kind", [0, 1])
def test_what_the_cache_has_is_no_option(kind: int) -> None:
    """A page table would make a contiguous cache a pool of pages."""
    cache, table = caches()[kind], np.zeros((BATCH, 1), np.int32)
    query, key, value = (x[0] for x in tokens(1))
    with pytest.raises(TypeError, match="page_table"):
        cache.attend(query, page_table=table)
    with pytest.raises(TypeError, match="page_table"):
        cache.rope_append(query, key, value, page_table=table)
    with pytest.raises(TypeError, match="page_table"):
        cache.rope_append_qkvpacked(query[:, 0], page_table=table)


def test_quantised_cache() -> None:
    cache = KVCache.create(
        BATCH, 8, KV_HEADS, WIDTH, dtype=jnp.int8, k_scale=0.03, v_scale=[0.03, 0.04]
    )
    _, key, value = tokens(1)
    cache = cache.append(key[0], value[0])
    assert cache.k.dtype == jnp.int8
    out = cache.attend(np.zeros((BATCH, HEADS, WIDTH), np.float32))
    want = np.clip(value[0], -127 * 0.03, None)
    assert_close(out, jnp.repeat(want, HEADS // KV_HEADS, 1), 0.02)


def test_errors_of_create() -> None:
    with pytest.raises(ValueError, match=r"batch must be an integer .* got 0"):
        KVCache.create(0, 4, 2, 8)
    with pytest.raises(ValueError, match=r"page_size must be an integer .* got 1.5"):
        PagedKVCache.create(4, cast(int, 1.5), 2, 8, batch=1, max_pages=2)
    with pytest.raises(ValueError, match=r"dtype must be one of .*int32"):
        KVCache.create(1, 4, 2, 8, dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got None"):
        KVCache.create(1, 4, 2, 8, dtype=None)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'bf16'"):
        KVCache.create(1, 4, 2, 8, dtype="bf16")
    with pytest.raises(ValueError, match=r"k_scale must be a number .* got 'x'"):
        KVCache.create(1, 4, 2, 8, dtype=jnp.int8, k_scale="x")
    with pytest.raises(ValueError, match=r"k_scale is for caches of .* bfloat16: 2"):
        KVCache.create(1, 4, 2, 8, k_scale=2)
    with pytest.raises(ValueError, match=r"v_scale must be .* K=2 heads, .*\(3,\)"):
        KVCache.create(1, 4, 2, 8, dtype=jnp.int8, v_scale=jnp.ones(3))


def test_copy_on_write() -> None:
    """A fork that writes leaves what it was forked from as it was."""
    allocator = PageAllocator(8, 4)
    cache = PagedKVCache.create(
        8, 4, KV_HEADS, WIDTH, batch=2, max_pages=3, dtype=jnp.float32
    )
    rng = np.random.default_rng(0)
    key = rng.standard_normal((2, 8, KV_HEADS, WIDTH)).astype(np.float32)
    query = rng.standard_normal((2, HEADS, WIDTH)).astype(np.float32)

    parent = allocator.alloc(6)
    table = allocator.page_table([parent, parent], 3)
    off = jnp.array([0, -1], jnp.int32)
    cache = dataclasses.replace(cache, page_table=table, lengths=off)
    cache = cache.append(key[:, :6], key[:, :6])

    child = allocator.fork(parent)
    assert allocator.pages(child) == allocator.pages(parent)
    copies = [*allocator.extend(parent, 2), *allocator.extend(child, 2)]
    assert len(copies) == 1  # the second to write owns its page alone
    cache = cache.copy_pages(*zip(*copies, strict=True))
    table = allocator.page_table([parent, child], 3)
    assert table[0, 0] == table[1, 0]
    assert table[0, 1] != table[1, 1]
    both = jnp.array([6, 6], jnp.int32)
    cache = dataclasses.replace(cache, page_table=table, lengths=both)
    cache = cache.append(key[:, 6:], key[:, 6:])
    whole = np.stack([key[0], np.concatenate([key[0, :6], key[1, 6:]])])
    want = mha(query[:, None], whole, whole)[:, 0]
    assert_close(cache.attend(query), want)


def test_copy_of_no_page() -> None:
    cache = PagedKVCache.create(2, 4, 1, 8, batch=1, max_pages=1)
    cache = dataclasses.replace(cache, k=cache.k.at[0].set(1))
    got = cache.copy_pages([0, 0], [-1, 2])
    np.testing.assert_array_equal(got.k, cache.k)


def test_copies_are_in_order() -> None:
    """Chains, targets that return, and pages that do not exist, as if one by one."""
    rng, pages = np.random.default_rng(0), 5
    k = np.arange(1, pages + 1, dtype=np.float32)
    cache = PagedKVCache.create(pages, 1, 1, 1, batch=1, max_pages=1)
    cache = dataclasses.replace(
        cache, k=k.reshape(cache.k.shape), v=-k.reshape(cache.v.shape)
    )
    source, target = rng.integers(-1, pages + 2, (2, 300, 6), dtype=np.int32)

    @jax.jit
    @jax.vmap
    def copied(source: jax.Array, target: jax.Array) -> Any:
        new = cache.copy_pages(source, target)
        return new.k.ravel(), new.v.ravel()

    got_k, got_v = copied(source, target)
    for row, pairs in enumerate(zip(source, target, strict=True)):
        want = k.copy()
        for a, b in zip(*pairs, strict=True):
            if 0 <= a < pages and 0 <= b < pages:
                want[b] = want[a]
        np.testing.assert_array_equal(got_k[row], want)
        np.testing.assert_array_equal(got_v[row], -want)


def test_any_number_of_copies_is_exported() -> None:
    cache = PagedKVCache.create(4, 1, 1, 1, batch=1, max_pages=1)
    cache = dataclasses.replace(
        cache, k=jnp.arange(4, dtype=jnp.bfloat16).reshape(4, 1, 1, 1)
    )
    (count,) = jax.export.symbolic_shape("n")
    pages = jax.ShapeDtypeStruct((count,), jnp.int32)
    copies = jax.export.export(jax.jit(PagedKVCache.copy_pages))(cache, pages, pages)
    for pairs in (([3], [1]), ([1, 0, 2], [0, 2, 3])):
        source, target = (np.asarray(x, np.int32) for x in pairs)
        got: Any = copies.call(cache, source, target)
        want = cache.copy_pages(source, target)
        np.testing.assert_array_equal(got.k, want.k)


def test_errors_of_copy_pages() -> None:
    cache = PagedKVCache.create(4, 2, 1, 8, batch=1, max_pages=1)
    assert cache.copy_pages([], []) is cache
    for source, target, message in (
        ([0.5], [1], r"source must be integers \[n\], got float32\(1,\)"),
        ([0], [[1]], r"target must be integers \[n\], got int32\(1, 1\)"),
        (0, [1], "source must be an array, got int: 0"),
        ([0], [1, 2], r"target must be as long as source \(1,\), got \(2,\)"),
        ([None], [1], r"source must be integers \[n\], got \w+\(1,\)"),
        ([[0], [1, 2]], [1], r"source must be integers \[n\], got \[\[0\], \[1, 2\]\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.copy_pages(source, target)
    np.testing.assert_array_equal(cache.copy_pages([0], [2**40]).k, cache.k)


def test_out_of_pages_loses_nothing() -> None:
    allocator = PageAllocator(4, 2)
    first = allocator.alloc(5)
    with pytest.raises(OutOfPagesError, match="2 pages are needed and 1 of 4 are free"):
        allocator.alloc(3)
    with pytest.raises(OutOfPagesError):
        allocator.extend(first, 4)
    assert (allocator.length(first), allocator.free_pages) == (5, 1)
    fork = allocator.fork(first)
    allocator.alloc(2)
    with pytest.raises(OutOfPagesError):
        allocator.extend(fork, 1)  # needs a copy of the last page
    assert allocator.pages(fork) == allocator.pages(first)
    assert allocator.length(fork) == 5
    allocator.free(first)
    assert allocator.extend(fork, 1) == []  # nobody shares it any more


def test_errors_of_the_allocator() -> None:
    allocator = PageAllocator(4, 2)
    one = allocator.alloc(8)
    for call, message in (
        (lambda: allocator.pages(7), "sequence must be one that exists, got 7"),
        (lambda: allocator.alloc(-1), "length must be .* got -1"),
        (lambda: allocator.extend(one, cast(int, 1.5)), "tokens must be .* got 1.5"),
        (lambda: allocator.pages(cast(int, [one])), r"sequence must be .* got \[0\]"),
        (lambda: allocator.fork(one, 9), "length must be at most the 8 tokens"),
        (lambda: allocator.truncate(one, 9), "length must be at most the 8 tokens"),
        (lambda: allocator.page_table([one], -1), "max_pages must be .* got -1"),
        (lambda: allocator.page_table([one], 3), "max_pages must be at least the 4"),
        (lambda: allocator.page_table(cast(Any, one), 4), "sequences must be .* got 0"),
        (lambda: allocator.owners(4), r"page must be in \[0, 4\), got 4"),
        (lambda: allocator.owners(cast(int, 0.5)), "page must be .* got 0.5"),
        (lambda: PageAllocator(0, 2), "num_pages must be .* got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    allocator.free(one)
    with pytest.raises(ValueError, match="sequence must be one that exists"):
        allocator.free(one)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32])
def test_integers_of_numpy(dtype: Any) -> None:
    """Whose sums and negatives do not wrap."""
    allocator = PageAllocator(100, dtype(4))
    one = allocator.alloc(dtype(100))
    allocator.extend(one, dtype(100))
    assert (allocator.length(one), len(allocator.pages(one))) == (200, 50)
    fork = allocator.fork(one, dtype(5))
    assert allocator.pages(fork) == allocator.pages(one)[:2]
    allocator.truncate(one, dtype(5))
    assert (allocator.length(one), allocator.free_pages) == (5, 98)
    assert allocator.page_table([fork], dtype(3)).shape == (1, 3)
    assert allocator.owners(dtype(0)) == 2


class AllocatorMachine(RuleBasedStateMachine):
    """An allocator and what each page of a simulated pool holds."""

    PAGES, PAGE = 6, 3

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(self.PAGES, self.PAGE)
        self.pool = np.zeros((self.PAGES, self.PAGE), int)
        self.tokens: dict[int, list[int]] = {}
        self.written = 0

    def write(self, sequence: int, start: int) -> None:
        """New tokens of a sequence from position `start` to its length."""
        for at in range(start, self.allocator.length(sequence)):
            self.written += 1
            self.tokens[sequence].append(self.written)
            page = self.allocator.pages(sequence)[at // self.PAGE]
            self.pool[page, at % self.PAGE] = self.written

    def pick(self, data: Any) -> int:
        """One of the sequences."""
        return data.draw(st.sampled_from(sorted(self.tokens)))

    def state(self) -> Any:
        """What an operation that raises may not change."""
        a = self.allocator
        return [(s, a.pages(s), a.length(s)) for s in a.sequences], a.free_pages

    @rule(length=st.integers(0, 10))
    def alloc(self, length: int) -> None:
        """A new sequence, all its tokens written."""
        before = self.state()
        try:
            sequence = self.allocator.alloc(length)
        except OutOfPagesError:
            assert before == self.state()
            assert -(-length // self.PAGE) > self.allocator.free_pages
            return
        assert sequence not in self.tokens
        self.tokens[sequence] = []
        self.write(sequence, 0)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), count=st.integers(0, 7))
    def extend(self, data: Any, count: int) -> None:
        """More tokens, after the copies asked for."""
        sequence, before = self.pick(data), self.state()
        try:
            copies = self.allocator.extend(sequence, count)
        except OutOfPagesError:
            assert before == self.state()
            return
        for source, target in copies:
            self.pool[target] = self.pool[source]
        self.write(sequence, len(self.tokens[sequence]))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        """A sequence that shares a prefix."""
        parent, free = self.pick(data), self.allocator.free_pages
        length = data.draw(st.integers(0, len(self.tokens[parent])))
        child = self.allocator.fork(parent, length)
        assert self.allocator.free_pages == free
        self.tokens[child] = self.tokens[parent][:length]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        """A sequence that loses its last tokens, whoever shares them."""
        sequence = self.pick(data)
        length = data.draw(st.integers(0, len(self.tokens[sequence])))
        self.allocator.truncate(sequence, length)
        del self.tokens[sequence][length:]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        """The end of a sequence."""
        sequence = self.pick(data)
        self.allocator.free(sequence)
        del self.tokens[sequence]

    @invariant()
    def contents(self) -> None:
        """Every sequence still reads its own tokens."""
        for sequence, tokens in self.tokens.items():
            pages = self.allocator.pages(sequence)
            assert self.allocator.length(sequence) == len(tokens)
            assert len(pages) == -(-len(tokens) // self.PAGE)
            assert self.pool[list(pages)].ravel()[: len(tokens)].tolist() == tokens

    @invariant()
    def counts(self) -> None:
        """Owners are counted right, and no page is lost or given twice."""
        held = [p for s in self.tokens for p in self.allocator.pages(s)]
        for page in range(self.PAGES):
            assert self.allocator.owners(page) == held.count(page)
        for sequence in self.tokens:
            pages = self.allocator.pages(sequence)
            assert len(set(pages)) == len(pages)
        assert self.allocator.free_pages == self.PAGES - len(set(held))
        assert self.allocator.sequences == tuple(self.tokens)


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=60, deadline=None)
