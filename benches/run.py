"""Measure zcache beside zarr's CacheStore and the bare operation, and print one table.

    python benches/run.py [--quick] [--only NAME]... [--list] [--json PATH] [--dir PATH]

Each group of lines runs in a process of its own; within a line the contestants take turns. See
benches/README.md for what the lines mean.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from _measure import Row, table
from _setup import Scale

HERE = Path(__file__).resolve().parent

# Group: module and function, which takes a Scale and returns rows.
GROUPS = {
    "memory_hit": ("_hits", "memory_hit"),
    "first_hit": ("_hits", "first_hit"),
    "eviction": ("_eviction", "hits"),
    "miss": ("_hits", "miss_evict"),
    "disk_hit": ("_hits", "disk_hit"),
    "hit_elsewhere": ("_hits", "hit_elsewhere"),
    "loop_lag": ("_hits", "loop_lag"),
    "arrays": ("_arrays", "warm_arrays"),
    "sharded": ("_arrays", "sharded"),
    "sparse": ("_sparse", "sparse"),
    "decoded": ("_decoded", "rows"),
    "one_flight": ("_cold", "one_flight"),
    "cold": ("_cold", "cold_reads"),
    "slow_cache": ("_cold", "slow_cache"),
    "fills": ("_cold", "fill_rate"),
    "ranges": ("_ranges", "growth"),
    "deletes": ("_deletes", "siblings"),
    "bookkeeping": ("_index", "bookkeeping"),
    "throughput": ("_index", "throughput"),
    "memory": ("_capacity", "memory"),
    "ten_million": ("_capacity", "pool_memory"),
    "adaptive": ("_capacity", "adaptive_memory"),
    "sweep": ("_capacity", "sweep"),
    "directory": ("_directory", "rows"),
    "pool": ("_pool", "rows"),
    "sources": ("_pool_scale", "sources"),
    "slow_source": ("_pool_scale", "cold"),
    "million": ("_pool_scale", "million"),
    "revalidation": ("_freshness", "revalidation"),
    "opening": ("_freshness", "opening"),
    "sampling": ("_advice", "sampling"),
    "advice": ("_advice", "accuracy"),
}
_LONGEST = 300  # Seconds for one group; all of them together take a few minutes.


def machine() -> dict[str, object]:
    """What the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "zarr": installed("zarr"),
        "zcache": installed("zarr-zcache"),
        "cachebox": installed("cachebox"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def machine_line(facts: dict[str, object]) -> str:
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['kernel']}, Python {facts['python']}, "
        f"zarr {facts['zarr']}, load {facts['load']}"
    )


def run_group(name: str, scale: Scale) -> list[Row]:
    """Run one group here and now."""
    module, function = GROUPS[name]
    found = getattr(importlib.import_module(module), function)(scale)
    return asyncio.run(found) if inspect.iscoroutine(found) else found


def child(name: str, scale: Scale) -> tuple[list[Row], str | None]:
    """Run one group in a fresh process; returns its rows, and what went wrong."""
    command = [sys.executable, str(HERE / "run.py"), "--child", name]
    command += ["--quick"] if scale.quick else []
    command += ["--dir", scale.directory] if scale.directory else []
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=_LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        return [], f"took more than {_LONGEST} s"
    if done.returncode:
        return [], f"ended with status {done.returncode}"
    rows = json.loads(done.stdout.splitlines()[-1])
    for row in rows:
        row.pop("met")
    return [Row(**row) for row in rows], None


def measure(names: list[str], scale: Scale, path: Path) -> int:
    """Run the groups, print the table, write the copy."""
    facts = machine()
    rows: list[Row] = []
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name in names:
        start = time.monotonic()
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        found, error = child(name, scale)
        seconds[name] = round(time.monotonic() - start, 1)
        print(error or f"{seconds[name]} s", file=sys.stderr)
        rows += found
        if error:
            failed[name] = error
    print(machine_line(facts))
    print(table(rows))
    for name, error in failed.items():
        print(f"{name}: NOT MEASURED, {error}")
    result = {
        "machine": facts,
        "quick": scale.quick,
        "seconds": seconds,
        "failed": failed,
        "rows": [row.as_dict() for row in rows],
    }
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nThe same for machines: {path}; {sum(seconds.values()):.0f} s in all", file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sets, under a minute")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="part of a group's name"
    )
    parser.add_argument("--list", action="store_true", help="list the groups")
    parser.add_argument("--json", type=Path, default=HERE / "last.json", help="where the copy goes")
    parser.add_argument("--dir", help="where caches on disk are made (default: below /var/tmp)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    scale = Scale(quick=args.quick, directory=args.dir)
    if args.child:
        rows = run_group(args.child, scale)
        print(json.dumps([row.as_dict() for row in rows]))
        return 0
    names = [
        name
        for name, (module, _) in GROUPS.items()
        if (HERE / f"{module}.py").exists()
        and (not args.only or any(part in name for part in args.only))
    ]
    if args.list:
        print("\n".join(names))
        return 0
    if not names:
        parser.error(f"no group is named like {args.only}; see --list")
    return measure(names, scale, args.json)


if __name__ == "__main__":
    sys.exit(main())
