# make demo    the demo: one template, sixteen forks, compared with a cold boot
# make test    all tests, with real virtual machines; two at a time, timing tests alone
# make check   lint, types and fast tests, without virtual machines
# make crash   kill hundreds of host processes over QEMU and over the tests' fake VMMs; write docs/crash-run.md
# make fuzz    a million inputs for the agent's decoders and loop, and hostile guests for the host; hours
# make bench   benchmarks on this machine, into benchmarks/
# make docs    write the generated pages
# make dist    build the sdist and the wheel, into dist/
# make clean   remove everything that the others made, including the demo's image and kernel
#
# On Debian 12 each target installs its requirements (see tools/setup), and works in .venv.

BIN := .venv/bin
# If this is set, each of the thousand commands that the tests run compiles all of Coppice.
unexport PYTHONDONTWRITEBYTECODE
DEMO_HOME ?= $(CURDIR)/.demo-home
FUZZ_INPUTS ?= 1000000
BENCH_HOME ?= $(CURDIR)/.bench-home

.PHONY: demo test check crash fuzz bench docs dist clean setup-demo setup-dev lint

demo: setup-demo
	COPPICE_HOME=$(DEMO_HOME) $(BIN)/python demo/demo.py

test: setup-dev lint
	$(BIN)/python -m pytest -n 2 tests

check: setup-dev lint
	$(BIN)/python -m pytest tests/unit tests/benchmarks tests/contract tests/crash/test_killed_hosts_of_fakes.py

crash: setup-dev
	COPPICE_CRASH_KILLS=200 COPPICE_CRASH_REPORT=benchmarks/crash.json:docs/crash-run.md $(BIN)/python -m pytest tests/crash

fuzz: setup-dev
	$(BIN)/python tests/fuzz.py agent --inputs $(FUZZ_INPUTS)
	$(BIN)/python tests/fuzz.py decoder --inputs $(FUZZ_INPUTS)
	$(BIN)/python tests/fuzz.py host --inputs $$(( $(FUZZ_INPUTS) / 20 ))

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup-dev
	$(BIN)/coppice --home $(BENCH_HOME) image inspect debian >/dev/null 2>&1 || $(BIN)/coppice --home $(BENCH_HOME) image build debian
	$(BIN)/python -m bench fan-out --home $(BENCH_HOME) --samples 16 --output benchmarks/fan-out.json --plot benchmarks/fan-out.png
	$(BIN)/python -m bench capture --home $(BENCH_HOME) --output benchmarks/capture.json --plot benchmarks/capture.png
	$(BIN)/python -m bench tree --home $(BENCH_HOME) --output benchmarks/tree.json
	$(BIN)/python -m bench.client_cpu --home $(BENCH_HOME) --image debian --output benchmarks/client-cpu.json
	$(BIN)/python -m bench.many --output benchmarks/many.json
	[ "$$(id -u)" != 0 ] || $(BIN)/python -m bench.network --home $(BENCH_HOME) --output benchmarks/network.json

docs: setup-dev
	$(BIN)/python tools/generate_docs.py

dist: setup-dev
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

clean:
	rm -rf .venv $(DEMO_HOME) $(BENCH_HOME) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup-demo:
	@tools/setup demo

setup-dev:
	@tools/setup dev
