"""Low-bit matrix products."""
