"""A cache in a directory of a local file system."""
