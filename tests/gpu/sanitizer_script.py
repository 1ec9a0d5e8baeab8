"""Small kernel calls for `sanitizer_test`: every instantiation, each kind of mask."""

import jax
import numpy as np

from jax_flash import mha
from jax_flash._src import plan

WIDTHS = [(d, v) for d, v in plan.HEAD_DIMS] + [(33, 17), (6, 250), (100, 36), (31, 8)]


def main() -> None:
    """Runs the calls and prints how many there were."""
    rng = np.random.default_rng(0)
    calls = 0
    for dtype in (jax.numpy.bfloat16, jax.numpy.float16):
        for width, value_width in WIDTHS:
            shapes = ((2, 150, 4, width), (2, 170, 2, width), (2, 170, 2, value_width))
            arrays = [rng.standard_normal(s, np.float32).astype(dtype) for s in shapes]
            lengths = np.array([131, 3], np.int32)
            for options in (
                {"is_causal": True, "key_value_seq_lengths": lengths},
                {"window_size": (40, 20), "query_seq_lengths": lengths},
            ):
                out = mha(*arrays, **options, implementation="cuda", return_lse=True)
                jax.block_until_ready(out)
                calls += 1
    print("kernel calls:", calls)


if __name__ == "__main__":
    main()
