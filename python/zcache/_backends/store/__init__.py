"""A cache in any other Zarr store, reached through its own methods."""
