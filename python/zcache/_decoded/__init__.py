"""Decoded chunks: what this process keeps of them, and the codec pipeline that reads through it."""
