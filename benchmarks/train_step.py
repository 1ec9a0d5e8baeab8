"""A training step of a language model, with different attention, side by side.

    python -m benchmarks.train_step             # 124M parameters, 8 x 2048 tokens
    python -m benchmarks.train_step --smoke     # tiny, on any machine

The model of examples/train_lm.py. Both arms start from the same weights, see the same
tokens (bytes of English text) and take turns of a few steps, in one process; nothing is
recomputed in the backward. Prints the time of a step, and how far the losses part.
Returns 1 if they part by more than rounding explains.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_flash import backends

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "train_lm.py"
# Attention by `jax.nn` in XLA, for machines without a GPU; "cudnn" is `jax.nn`'s too.
JAX_NN = "jax_nn"
# In nats. Two runs in bfloat16 that round differently part by a few thousandths a step
# at first and by more as training goes on.
TOLERANCE = 0.05


def example() -> Any:
    """The module examples/train_lm.py, which is no package's."""
    if "train_lm" not in sys.modules:
        spec = importlib.util.spec_from_file_location("train_lm", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["train_lm"] = module
        spec.loader.exec_module(module)
    return sys.modules["train_lm"]


def config_of(smoke: bool) -> Any:
    """124M parameters: 12 layers, 12 heads of 64, SwiGLU, tied embedding."""
    if smoke:
        return example().Config(
            vocabulary=256, length=32, batch=2, width=32, layers=2, heads=2, hidden=64
        )
    return example().Config(
        vocabulary=50304,
        length=2048,
        batch=8,
        width=768,
        layers=12,
        heads=12,
        kv_heads=12,
        head_dim=64,
        hidden=2048,
        dtype=jnp.bfloat16,
    )


def register_jax_nn() -> None:
    """Makes `jax.nn`'s XLA attention an implementation that the model can name."""
    if JAX_NN in backends.names():
        return

    def run(call: backends.Call, operands: dict[str, jax.Array]) -> Any:
        out = jax.nn.dot_product_attention(
            *(operands[name] for name in ("query", "key", "value")),
            scale=call.scale,
            is_causal=call.is_causal,
            implementation="xla",
        )
        return out, None

    backends.register(backends.Backend(JAX_NN, (), lambda call: None, run))


@dataclasses.dataclass
class Arm:
    """A model in training.

    Attributes:
      parameters: how many the model has.
      step: state, tokens -> state, loss; compiled, the state donated.
      state: weights and optimizer.
      losses: before each update.
      seconds: of a step, one number for each turn.
    """

    parameters: int
    step: Callable[[Any, jax.Array], tuple[Any, jax.Array]]
    state: Any
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def turn(self, batches: list[jax.Array]) -> None:
        """Steps started back to back, so that the host runs ahead of the device."""
        start = time.perf_counter()
        losses = []
        for tokens in batches:
            self.state, loss = self.step(self.state, tokens)
            losses.append(loss)
        jax.block_until_ready((self.state, losses))
        self.seconds.append((time.perf_counter() - start) / len(batches))
        self.losses += map(float, losses)


def arm_of(
    config: Any, implementation: str, steps: int, seed: int
) -> Callable[[], Arm]:
    """Traces a step; the weights depend on the seed alone.

    Returns:
      A function that compiles it, which may run in a thread.
    """
    config = dataclasses.replace(config, implementation=implementation)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 6e-4, 1 + steps // 5, 1 + steps, 6e-5
    )
    rule = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1)
    )

    @nnx.jit
    def create() -> tuple[Any, Any]:
        model = example().LanguageModel(config, nnx.Rngs(seed))
        return model, nnx.Optimizer(model, rule, wrt=nnx.Param)

    model, optimizer = create()
    graph, state = nnx.split((model, optimizer))

    def step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graph, state)
        loss, gradients = nnx.value_and_grad(example().loss_of)(model, tokens)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), loss

    tokens = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32)
    lowered = jax.jit(step, donate_argnums=0).lower(state, tokens)
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return lambda: Arm(parameters, lowered.compile(), state)


def batches_of(config: Any, steps: int, seed: int) -> list[jax.Array]:
    """Random windows of the example's text, as bytes: int32 [batch, length + 1]."""
    text = np.frombuffer(example().read_text()[0].encode(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(seed)
    offsets = np.arange(config.length + 1)
    last, size = text.size - config.length, (config.batch, 1)
    return [
        jnp.asarray(text[rng.integers(last, size=size) + offsets]) for _ in range(steps)
    ]


def attention_of(config: Any, implementation: str) -> str:
    """How an implementation runs the model's attention, kernels by name."""
    rows = config.batch, config.length
    query, key = (
        jax.ShapeDtypeStruct((*rows, heads, config.head_dim), config.dtype)
        for heads in (config.heads, config.kv_heads)
    )
    explanation = backends.explain(
        query, key, key, is_causal=True, implementation=implementation
    )
    return f"{implementation}: {explanation.details.get(implementation, 'attention')}"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny, on any machine")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turn", type=int, default=5, help="steps of a turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--arms",
        help="two implementations; default: cuda,cudnn, with --smoke xla,jax_nn",
    )
    arguments = parser.parse_args(argv)
    default = f"xla,{JAX_NN}" if arguments.smoke else "cuda,cudnn"
    arguments.arms = (arguments.arms or default).split(",")
    if len(set(arguments.arms)) != 2:
        parser.error(f"--arms must be two implementations, got {arguments.arms}")
    if arguments.turn < 1 or arguments.steps < 2 * arguments.turn:
        parser.error("needs --turn >= 1 and --steps of two turns or more")
    example().check_seed(parser, arguments.seed)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if the losses of the arms part."""
    arguments = parse_arguments(argv)
    register_jax_nn()
    config = config_of(arguments.smoke)
    steps, turn = arguments.steps, arguments.turn
    start = time.perf_counter()
    batches = batches_of(config, steps, arguments.seed)
    ready = [arm_of(config, name, steps, arguments.seed) for name in arguments.arms]
    with concurrent.futures.ThreadPoolExecutor(len(ready)) as pool:
        compiled = pool.map(lambda compile_one: compile_one(), ready)
        arms = dict(zip(arguments.arms, compiled, strict=True))
    size = next(iter(arms.values())).parameters
    print(
        f"{jax.devices()[0].device_kind}, {size / 1e6:.1f}M parameters, "
        f"{config.batch} x {config.length} tokens, compiled in "
        f"{time.perf_counter() - start:.0f} s"
    )
    print(attention_of(config, arguments.arms[0]))
    for first in range(0, steps, turn):
        for arm in arms.values():
            arm.turn(batches[first : first + turn])
    # The first turn warms up.
    medians = {
        name: statistics.median(arm.seconds[1:]) * 1e3 for name, arm in arms.items()
    }
    for name, arm in arms.items():
        tokens = config.batch * config.length / medians[name]
        least, most = (1e3 * f(arm.seconds[1:]) for f in (min, max))
        print(
            f"{name:8} {medians[name]:8.2f} ms a step ({least:.2f} to {most:.2f}), "
            f"{tokens:.0f}k tokens/s, loss "
            f"{arm.losses[0]:.3f} to {arm.losses[-1]:.3f}"
        )
    ours, theirs = arguments.arms
    print(f"{ours} is {medians[theirs] / medians[ours]:.3f} times as fast as {theirs}")
    differences = np.abs(np.subtract(*(arm.losses for arm in arms.values())))
    print(
        f"losses of {steps} steps part by {differences.max():.4f} nats at most "
        f"(step {differences.argmax()}), {differences.mean():.4f} in the mean"
    )
    agree = bool(differences.max() <= TOLERANCE)
    if not agree:
        print(f"wrong: by more than {TOLERANCE}")
    return int(not agree)


if __name__ == "__main__":
    sys.exit(main())
