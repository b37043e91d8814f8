"""How large a cache should be, and which policy suits it: what requests say that were sampled or recorded."""
