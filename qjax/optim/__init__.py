"""optax transformations in low precision."""
