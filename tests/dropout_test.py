"""Dropout: the generator, what is dropped, and derivatives against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import specs
from helpers import assert_close, normal, qkv, shrink_blocks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flash import mha
from jax_flash._src import dropout

KEY = jax.random.PRNGKey(7)
MASK = (1 << 32) - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-7 in Python's integers."""
    x, k = list(counter), list(key)
    for _ in range(7):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [
            (second >> 32) ^ x[1] ^ k[0],
            second & MASK,
            (first >> 32) ^ x[3] ^ k[1],
            first & MASK,
        ]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return x


def hashed(i: int, j: int, seed: list[int]) -> int:
    """The word of row i and key j, in Python's integers."""
    row, key = (4 * (x // 64) + x // 2 % 4 for x in (i, j))
    x = seed[0] + row * 0x165667B1 + key * 0x27D4EB2F & MASK
    x = (x ^ x >> 17) * 0xED5AD4BB + seed[1] & MASK
    x = (x ^ x >> 11) * 0xAC4C1B51 & MASK
    x ^= x >> 15
    x *= 0x752DE713 if i % 2 else 1
    x *= 0xFE0AAFC3 if i // 16 % 2 else 1
    x *= 0xFE3662D1 if i // 32 % 2 else 1
    x *= 0x3C7D16C7 if j % 2 else 1
    x *= 0x76F2D33F if j // 16 % 2 else 1
    x *= 0xF97BB491 if j // 32 % 2 else 1
    x &= MASK
    return x ^ x >> 14


def factors(batch: int, heads: int, rows: int, keys: int, rate: float) -> np.ndarray:
    """What probabilities are multiplied by, from the definition: [B, N, T, S]."""
    count = round(256 * rate)
    result = np.zeros((batch, heads, rows, keys))
    words = [int(word) for word in KEY]
    for b, n in np.ndindex(batch, heads):
        seed = philox([n, b, 0, 0], words)[:2]
        for i, j in np.ndindex(rows, keys):
            word = hashed(i, j, seed)
            byte = word >> 8 * (2 * (i // 8 % 2) + j // 8 % 2) & 255
            kept = byte >= count if count <= 128 else byte < 256 - count
            result[b, n, i, j] = 256 / (256 - count) if kept else 0
    return result


def dropped(query, key, value, keep):
    """Attention in jnp with given factors."""
    groups = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, groups, 2), jnp.repeat(value, groups, 2)
    s = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest")
    p = jax.nn.softmax(s * query.shape[-1] ** -0.5) * keep
    return jnp.einsum("bnts,bsnh->btnh", p, value, precision="highest")


def test_known_answers() -> None:
    """Of the generator's authors' own test vectors."""
    for counter, key, expected in (
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ):
        x0, x1, x2, x3, k0, k1 = map(jnp.uint32, counter + key)
        got = dropout.philox((x0, x1, x2, x3), (k0, k1))
        assert tuple(map(int, got)) == expected
        assert tuple(philox(list(counter), list(key))) == expected


def drawn_bytes(n: int, seed: tuple[int, int]) -> np.ndarray:
    """Of n rows and keys the byte that decides of each probability, [n, n]."""
    index = np.arange(n, dtype=np.uint32)
    numbers = jnp.uint32(seed[0]), jnp.uint32(seed[1])
    rows, keys = jnp.asarray(index[:, None]), jnp.asarray(index)
    words = np.asarray(dropout.hashed(rows, keys, numbers))
    half = index // 8 % 2
    return (words >> 8 * (2 * half[:, None] + half) & 255).astype(np.uint8)


def test_bytes_are_uniform_and_independent() -> None:
    """Numbers of each byte of a hash, and of pairs of halves of its 256 bytes."""
    n = 2048
    axis = (n // 64, 2, 2, 2, 4, 2)  # bits of an index: of these 2 belong to the hash
    drawn = drawn_bytes(n, (0x243F6A88, 0x85A308D3)).reshape(axis + axis)
    drawn = drawn.transpose(1, 2, 3, 5, 7, 8, 9, 11, 0, 4, 6, 10).reshape(256, -1)
    for x in drawn:
        counts = np.bincount(x, minlength=256)
        expected = x.size / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 4.5 * 510**0.5
    high = drawn >> 4
    for a, b in zip(*np.triu_indices(256, 1), strict=True):
        counts = np.bincount(16 * high[a] + high[b], minlength=256)
        expected = high.shape[1] / 256
        # Of 32640 sums of 256 squares one is that large once in a hundred times.
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5.5 * 510**0.5


@pytest.mark.parametrize("least", [26, 128])
def test_no_few_are_dropped_together(least: int) -> None:
    """Of three and four bytes of a hash, at random and in rectangles."""
    n = 4096
    axis = (n // 64, 2, 2, 2, 4, 2)
    drops = (drawn_bytes(n, (0xA4093822, 0x299F31D0)) < least).reshape(axis + axis)
    drops = drops.transpose(1, 2, 3, 5, 7, 8, 9, 11, 0, 4, 6, 10).reshape(16, 16, -1)
    random = np.random.default_rng(3)
    for count in (3, 4):
        for _ in range(500):
            which = random.choice(256, count, replace=False)
            if count == 4 and which[0] % 2:
                rows, keys = (random.choice(16, 2, replace=False) for _ in range(2))
                which = (16 * rows[:, None] + keys).reshape(-1)
            together = drops[which // 16, which % 16].all(0).sum()
            mean = drops.shape[2] * (least / 256) ** count
            assert abs(together - mean) < 5 * mean**0.5 + 5


@pytest.mark.parametrize("least", [26, 128])
def test_no_distance_correlates(least: int) -> None:
    """Of any two probabilities that are equally far apart, and of rows and columns."""
    n = 2048
    share = least / 256
    drops = drawn_bytes(n, (0x13198A2E, 0x03707344)) < least
    signs = (drops - share) / (share * (1 - share)) ** 0.5
    for axis in (0, 1):
        sums = signs.sum(axis, dtype=np.float64)
        assert abs((sums**2 / n).sum() - n) < 4.5 * (2 * n) ** 0.5
    spectrum = np.fft.rfft2(signs, (2 * n, 2 * n))
    together = np.fft.irfft2(spectrum * spectrum.conj())
    pairs = n - np.abs(np.fft.fftfreq(2 * n, 1 / (2 * n)))
    many = pairs >= n // 8
    spread = np.sqrt(pairs[many][:, None] * pairs[many])
    deviations = together[np.ix_(many, many)] / spread
    deviations[0, 0] = 0
    # The largest of 14 million normal numbers is beyond 6.5 once in a thousand times.
    assert np.abs(deviations).max() < 6.5


def test_threshold() -> None:
    rates = (1e-6, 1 / 256, 0.1, 0.5, 0.999999)
    assert [dropout.threshold(rate) for rate in rates] == [1, 1, 26, 128, 255]


@pytest.mark.parametrize(("chunked", "rate"), [(False, 0.25), (True, 0.75)])
def test_against_the_definition(
    chunked: bool, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, gradients and tangents, whatever the blocks."""
    if chunked:
        shrink_blocks(monkeypatch)
    spec = specs.Spec(2, 19, 69, 4, 2, 8, 6, dtype="float32")
    arrays = tuple(map(jnp.asarray, spec.arrays()))
    exact = factors(2, 4, 19, 69, rate)
    given = {"dropout_rate": rate, "dropout_key": np.asarray(KEY)}
    np.testing.assert_array_equal(oracle.kept_of(exact.shape, given), exact)
    keep = jnp.asarray(exact, jnp.float32)
    flash = functools.partial(mha, dropout_rate=rate, dropout_key=KEY)
    dense = functools.partial(dropped, keep=keep)
    assert_close(jax.jit(flash)(*arrays), dense(*arrays))

    def total(f, *a):
        return jnp.sin(f(*a)).sum()

    def g(f):
        return jax.grad(functools.partial(total, f), (0, 1, 2))

    assert_close(jax.jit(g(flash))(*arrays), g(dense)(*arrays))
    tangents = tuple(normal(*x.shape) for x in arrays)
    assert_close(jax.jvp(flash, arrays, tangents), jax.jvp(dense, arrays, tangents))


def test_keys() -> None:
    """The key is an operand; typed keys and their words are one."""
    args = qkv()
    run = jax.jit(lambda key: mha(*args, dropout_rate=0.5, dropout_key=key))
    out = run(jax.random.key(7))
    assert_close(run(KEY), out, 0)
    assert not np.allclose(run(jax.random.key(8)), out, atol=1e-2)
    long = np.array([0, 7, 1, 2], np.uint32)
    assert not np.allclose(run(long), out, atol=1e-2)
    four = mha(*qkv(), dropout_rate=0.5, dropout_key=jax.random.key(7, impl="rbg"))
    assert np.isfinite(four).all()


def test_lse_is_that_without_dropout() -> None:
    out, lse = mha(*qkv(), dropout_rate=0.5, dropout_key=KEY, return_lse=True)
    plain, expected = mha(*qkv(), return_lse=True)
    assert_close(lse, expected, 0)
    assert not np.allclose(out, plain, atol=1e-2)


def test_share_that_is_kept() -> None:
    query, key = normal(2, 256, 2, 4) * 0, normal(2, 256, 2, 4)
    value = jnp.ones((2, 256, 2, 1))
    out = mha(query, key, value, dropout_rate=0.1, dropout_key=KEY)
    kept = np.asarray(out) * (256 - 26)
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    # 262144 draws: five standard deviations of their mean.
    np.testing.assert_allclose(out.mean(), 1.0, atol=5 * 0.34 / 512)
    assert np.abs(np.corrcoef(np.asarray(out)[..., 0].reshape(2, -1))[0, 1]) < 0.25


def test_vmap_and_shardings_do_not_change_what_is_dropped() -> None:
    flash = functools.partial(mha, dropout_rate=0.5, dropout_key=KEY)
    expected = flash(*qkv())
    stacked = [jnp.stack([x, x]) for x in qkv()]
    assert_close(jax.vmap(flash)(*stacked), jnp.stack([expected, expected]))
    keys = jnp.stack([KEY, KEY + jnp.uint32(1)])

    def keyed(key):
        return mha(*qkv(), dropout_rate=0.5, dropout_key=key)

    assert_close(jax.vmap(keyed)(keys), jnp.stack([keyed(key) for key in keys]))
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharding = NamedSharding(mesh, P("x", None, "y"))
    placed = [jax.device_put(x, sharding) for x in qkv()]
    assert_close(jax.jit(flash)(*placed), expected)
