"""Private rooms of `jax_flash`; nothing here is a stable interface."""
