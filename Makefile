# The one command runner: people and .ci/run call the same targets. Needs CPython 3.11+, a Rust toolchain with rustfmt and
# clippy, and make; everything else goes into .venvs/, dist/ and target/ below this directory.
#
#   PYTHON=python3.12   the interpreter of the build and of .venvs/base (default: python3)
#   ARGS='...'          more arguments for the demo, the benches and the soak, and for pytest in check and test
#   JOBS=0              how many pytest workers (default 4, for they wait more than they compute; 0: one process, for a
#                       debugger or -s)

PYTHON ?= python3
CARGO ?= cargo
JOBS ?= 4
ARGS ?=

.DEFAULT_GOAL := help
# Prerequisites run in the order in which they are written: the cheapest checks first. Set where `test` has two of them
# under way.
AT_ONCE ?=
ifndef AT_ONCE
.NOTPARALLEL:
endif

# The tests of `make test` are about the installed wheel: the caller's environment must not put another zcache, or another
# interpreter, in its place.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
# Images of containers set it. Each of the hundreds of processes that tests start would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONNOUSERSITE := 1
# CI has no terminal to answer on.
export PIP_NO_INPUT := 1

# In CI a Cargo.lock that does not fit Cargo.toml is an error; elsewhere cargo updates it and git shows the change.
LOCKED := $(if $(CI),--locked)
# It compiles each checkout once, which is slower where a second time is prepared.
ifdef CI
export CARGO_INCREMENTAL := 0
endif
# An absolute path, because pyo3's build script runs somewhere below target/. One fixed interpreter also keeps cargo from
# rebuilding pyo3 when `python3` changes its meaning.
WITH_PYTHON := PYO3_PYTHON='$(CURDIR)/.venvs/build/bin/python'
WITH_DEV_PYTHON := PYO3_PYTHON='$(CURDIR)/.venvs/dev/bin/python'
# Without the feature `python` the build must not need an interpreter. If pyo3 ever gets into that dependency graph, its
# build script fails on this name.
WITHOUT_PYTHON := PYO3_PYTHON=the-core-needs-no-python

# A glob, because ruff fails on a directory that does not exist.
TYPED := python/zcache tests/typed_usage.py
PY_SOURCES := $(wildcard python tests benches examples scripts)
RUST_BENCHES := $(basename $(notdir $(wildcard benches/*.rs)))
NEXTEST := $(shell $(CARGO) nextest --version >/dev/null 2>&1 && echo yes)

section = @printf '\n== %s\n' '$(1)'
comma := ,

# Types and behaviour depend on the pair of Python and zarr, so checks run in both environments. Where the machine has
# one interpreter only, `newest` is a link.
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

.PHONY: dev
dev: ## .venvs/dev: an editable build with all test and lint tools
	@'$(PYTHON)' scripts/envs.py dev

# One case of each parametrized test: some have hundreds. What tries all orders, deaths and damage is left to `test`.
LONG_RUST := $(addprefix --skip core_,damage deaths flips shuttle)
.PHONY: check
check: dev ## format, lint, types, spelling and the fast tests on one Python: before each commit
	$(call section,format and lint)
	.venvs/dev/bin/ruff format --check $(PY_SOURCES)
	.venvs/dev/bin/ruff check $(PY_SOURCES)
	$(CARGO) fmt --check
	$(WITH_DEV_PYTHON) $(CARGO) clippy $(LOCKED) --quiet --all-targets --features python -- -D warnings
	CARGO='$(CARGO)' '$(PYTHON)' scripts/notices.py --check
	.venvs/dev/bin/codespell
	$(call section,types)
	.venvs/dev/bin/mypy --strict $(TYPED)
	$(call section,fast tests)
ifeq ($(NEXTEST),yes)
	$(WITHOUT_PYTHON) $(CARGO) nextest run $(LOCKED) --lib --bins --tests --status-level fail --cargo-quiet -- $(LONG_RUST)
else
	$(WITHOUT_PYTHON) $(CARGO) test $(LOCKED) --lib --bins --tests --quiet -- $(LONG_RUST)
endif
	.venvs/dev/bin/python -m pytest -q -m 'not slow' --sample 1 -n $(JOBS) --dist loadgroup $(ARGS)

# One core compiles the wheel while the other one has the tests of Rust: both take minutes, and neither can use two. The
# wheel is the one that is released, link-time optimization and all: another one would be another program to test.
.PHONY: test
test: ## all lints and tests, on python3 and on the newest CPython found
	@$(MAKE) --no-print-directory -j2 --output-sync=target AT_ONCE=yes rust-test python-lint
	@$(MAKE) --no-print-directory python-test

.PHONY: lint
lint: rust-lint python-lint ## rustfmt, clippy, rustdoc, ruff, codespell, mypy, stubtest

.PHONY: bench
bench: env-newest ## measure against zarr's CacheStore and print the table
	$(call section,bench)
	.venvs/newest/bin/python benches/run.py $(ARGS)

.PHONY: soak
soak: env-newest ## long random runs with faults and kills, and all cases of all tests
	$(call section,soak)
	.venvs/newest/bin/python tests/soak.py $(ARGS)
	$(call section,all cases of all tests)
	.venvs/newest/bin/python -m pytest -n $(JOBS) --dist loadgroup $(ONCE_MORE)

.PHONY: torch
torch: ## the tests of the loader with the real PyTorch; downloads 5 GB
	@'$(PYTHON)' scripts/envs.py torch
	$(call section,loader)
	.venvs/torch/bin/python -m pytest tests/examples -k pytorch $(ARGS)

.PHONY: wheel
wheel: ## one abi3 wheel in dist/, on Linux for glibc 2.17 and later
	@'$(PYTHON)' scripts/envs.py wheel

.PHONY: reproduce
reproduce: ## build the wheel of the last commit twice, in two folders, and compare the bytes
	@'$(PYTHON)' scripts/reproduce.py

.PHONY: clean
clean: ## remove all that make has made
	rm -rf .venvs dist target .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache python/zcache/_core.*.so
	find $(PY_SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# Parts of the above; each also works by itself.

.PHONY: env-build env-both env-newest
env-build:
	@'$(PYTHON)' scripts/envs.py build
env-both: $(if $(AT_ONCE),env-build)
	@'$(PYTHON)' scripts/envs.py base newest
env-newest:
	@'$(PYTHON)' scripts/envs.py newest

# Without the feature only the library is another one: tests and benches are those that were checked.
.PHONY: rust-lint
rust-lint: env-build
	$(call section,rustfmt$(comma) clippy$(comma) rustdoc)
	$(CARGO) fmt --check
	CARGO='$(CARGO)' '$(PYTHON)' scripts/notices.py --check
	$(WITH_PYTHON) $(CARGO) clippy $(LOCKED) --quiet --all-targets --features python -- -D warnings
	$(WITHOUT_PYTHON) $(CARGO) clippy $(LOCKED) --quiet --lib -- -D warnings
	$(WITHOUT_PYTHON) RUSTDOCFLAGS='-D warnings' $(CARGO) doc $(LOCKED) --quiet --no-deps --document-private-items

# --lib --bins --tests leaves out the benches: nextest cannot list them, and each one runs once by name below.
.PHONY: rust-test
rust-test: $(if $(AT_ONCE),rust-lint)
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
	$(call section,ruff and codespell)
	.venvs/base/bin/ruff check $(PY_SOURCES)
	.venvs/base/bin/ruff format --check $(PY_SOURCES)
	.venvs/base/bin/codespell
	$(call in_each_env,mypy and stubtest,\
	  $$python -m mypy --strict $(TYPED) && $$python -m mypy.stubtest zcache._core)

# Of a test with three or more parameters run so many cases that each two of their values meet; `make soak` runs all.
# Long runs of what is alike on each Python take place on the newest one. The older one runs four cases of each test.
if_older = [ $$env = base ] && [ ! -L .venvs/newest ]
cases = $$(if $(if_older); then echo --without-once --sample 4; else echo --pairs; fi)

# What fails is run once more, for a test of threads and processes may not stand a machine that is busy with others. The
# summary names each such test; what fails twice, or ends the interpreter, fails.
ONCE_MORE := --reruns 1 --reruns-delay 5 -raR

.PHONY: python-test
python-test: env-both
	$(call in_each_env,pytest,\
	  $$python -m pytest -n $(JOBS) --dist loadgroup $(ONCE_MORE) $(cases) $(ARGS))
