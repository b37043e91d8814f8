"""Threads, coroutines, forks and buffers. Nothing here knows of caches."""
