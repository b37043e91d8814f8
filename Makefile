# The one command runner: people and .ci/run call the same targets. Needs CPython 3.11+, a Rust toolchain with rustfmt and
# clippy, and make; everything else goes into .venvs/, dist/ and target/ below this directory.
#
#   PYTHON=python3.12   the interpreter of the build and of .venvs/base (default: python3)
#   ARGS='...'          more arguments for what demo, bench and soak start, and for pytest in test
#   JOBS=0              how many pytest workers (default 2; 0: one process, for a debugger or -s)

PYTHON ?= python3
CARGO ?= cargo
JOBS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
# The order of a target's prerequisites is the order in which a person wants to hear of mistakes: cheapest first.
.NOTPARALLEL:

# The tests are about the installed wheel: nothing in the caller's environment may put another zcache, or another
# environment's interpreter, in its place.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
export PYTHONNOUSERSITE := 1
# CI has no terminal to answer on.
export PIP_NO_INPUT := 1

# In CI a Cargo.lock that does not fit Cargo.toml is an error; on a laptop cargo mends it and git shows that.
LOCKED := $(if $(CI),--locked)
# Absolute, for pyo3's build script runs somewhere below target/. One fixed interpreter also keeps cargo from building
# pyo3 anew whenever `python3` means something else.
WITH_PYTHON := PYO3_PYTHON='$(CURDIR)/.venvs/build/bin/python'
# Without the feature `python` nothing may need an interpreter: should pyo3 ever get into that graph, its build script
# stops at this name.
WITHOUT_PYTHON := PYO3_PYTHON=the-core-needs-no-python

# Globs, because a directory that does not exist is an error to ruff.
PY_SOURCES := $(wildcard python tests benches examples scripts)
RUST_BENCHES := $(basename $(notdir $(wildcard benches/*.rs)))
NEXTEST := $(shell $(CARGO) nextest --version >/dev/null 2>&1 && echo yes)

section = @printf '\n== %s\n' '$(1)'
comma := ,

# What types and behaviour depend on is the pair of Python and zarr, so both environments are asked. Where the machine
# has one interpreter only, `newest` is a link.
define in_each_env
@for env in base newest; do \
  python=.venvs/$$env/bin/python; \
  what=$$($$python -c 'import platform, zarr; print("CPython", platform.python_version(), "and zarr", zarr.__version__)'); \
  if [ -L .venvs/$$env ]; then \
    printf '\n== $(1): already done, %s is the newest here\n' "$$what"; \
  else \
    printf '\n== $(1): %s\n' "$$what"; \
    $(2) || exit 1; \
  fi; \
done
endef

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: ## read a dataset over S3 on loopback through zcache and print what it saved
	@'$(PYTHON)' scripts/envs.py demo
	$(call section,demo)
	.venvs/demo/bin/python examples/s3_demo.py $(ARGS)

.PHONY: test
test: rust-lint rust-test python-lint python-test ## all lints and tests, on python3 and on the newest CPython found

.PHONY: lint
lint: rust-lint python-lint ## rustfmt, clippy, rustdoc, ruff, mypy, stubtest

.PHONY: bench
bench: env-newest ## measure against zarr's CacheStore and print the table
	$(call section,bench)
	.venvs/newest/bin/python benches/run.py $(ARGS)

.PHONY: soak
soak: env-newest ## long random runs with faults and kills
	$(call section,soak)
	.venvs/newest/bin/python tests/soak.py $(ARGS)

.PHONY: wheel
wheel: ## one abi3 wheel in dist/
	@'$(PYTHON)' scripts/envs.py wheel

.PHONY: clean
clean: ## remove all that make has made
	rm -rf .venvs dist target .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(PY_SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# Parts of the above; each also works by itself.

.PHONY: env-build env-both env-newest
env-build:
	@'$(PYTHON)' scripts/envs.py build
env-both:
	@'$(PYTHON)' scripts/envs.py base newest
env-newest:
	@'$(PYTHON)' scripts/envs.py newest

.PHONY: rust-lint
rust-lint: env-build
	$(call section,rustfmt$(comma) clippy$(comma) rustdoc)
	$(CARGO) fmt --check
	$(WITHOUT_PYTHON) $(CARGO) clippy $(LOCKED) --quiet --all-targets -- -D warnings
	$(WITH_PYTHON) $(CARGO) clippy $(LOCKED) --quiet --all-targets --features python -- -D warnings
	$(WITHOUT_PYTHON) RUSTDOCFLAGS='-D warnings' $(CARGO) doc $(LOCKED) --quiet --no-deps --document-private-items

# --lib --bins --tests leaves out the benches: a crate without criterion's harness flags would fail nextest's listing,
# and each bench is run once by name below.
.PHONY: rust-test
rust-test:
	$(call section,cargo tests$(comma) no Python)
ifeq ($(NEXTEST),yes)
	$(WITHOUT_PYTHON) $(CARGO) nextest run $(LOCKED) --lib --bins --tests
else
	$(WITHOUT_PYTHON) $(CARGO) test $(LOCKED) --lib --bins --tests
endif
	$(WITHOUT_PYTHON) $(CARGO) test $(LOCKED) --doc
	$(if $(RUST_BENCHES),$(WITHOUT_PYTHON) $(CARGO) test $(LOCKED) $(addprefix --bench ,$(RUST_BENCHES)))

.PHONY: python-lint
python-lint: env-both
	$(call section,ruff)
	.venvs/base/bin/ruff check $(PY_SOURCES)
	.venvs/base/bin/ruff format --check $(PY_SOURCES)
	$(call in_each_env,mypy and stubtest,\
	  $$python -m mypy --strict python/zcache && $$python -m mypy.stubtest zcache._core)

.PHONY: python-test
python-test: env-both
	$(call in_each_env,pytest,$$python -m pytest -n $(JOBS) --dist loadgroup $(ARGS))
