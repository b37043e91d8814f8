"""One class for each kind of cache store, behind the interface in `base.py`."""
