"""Advice: what sampling costs a hit, and how far curves from a sample are from those of all requests."""

from __future__ import annotations
