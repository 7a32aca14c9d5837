# make demo    see it work: one template, sixteen forks, beside a cold boot
# make test    everything that proves it, with real virtual machines; two tests at a time, and those that measure time alone
# make check   lint, types and fast tests: no virtual machine
# make crash   kill several hundred host processes over real virtual machines, and say in docs/crash-run.md what was found
# make bench   measure it on this machine, into benchmarks/
# make docs    write the generated pages anew
# make clean   remove what the others made, the demo's cached image and kernel too
#
# On Debian 12 each installs what it needs by itself (tools/setup says what), and works in .venv.

BIN := .venv/bin
# Where it is set, each of the thousand commands that the tests run compiles all of Coppice anew.
unexport PYTHONDONTWRITEBYTECODE
DEMO_HOME ?= $(CURDIR)/.demo-home
BENCH_HOME ?= $(CURDIR)/.bench-home

.PHONY: demo test check crash bench docs clean setup-demo setup-dev lint

demo: setup-demo
	COPPICE_HOME=$(DEMO_HOME) $(BIN)/python demo/demo.py

test: setup-dev lint
	$(BIN)/python -m pytest -n 2 tests

check: setup-dev lint
	$(BIN)/python -m pytest tests/unit tests/bench tests/contract

crash: setup-dev
	COPPICE_CRASH_KILLS=200 COPPICE_CRASH_REPORT=benchmarks/crash.json:docs/crash-run.md $(BIN)/python -m pytest tests/crash/test_killed_hosts.py

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src tests demo/demo.py tools

bench: setup-dev
	$(BIN)/coppice --home $(BENCH_HOME) image inspect debian >/dev/null 2>&1 || $(BIN)/coppice --home $(BENCH_HOME) image build debian
	$(BIN)/coppice --home $(BENCH_HOME) bench fan-out --samples 16 --output benchmarks/fan-out.json --plot benchmarks/fan-out.png
	$(BIN)/coppice --home $(BENCH_HOME) bench capture --output benchmarks/capture.json --plot benchmarks/capture.png

docs: setup-dev
	$(BIN)/python tools/generate_docs.py

clean:
	rm -rf .venv $(DEMO_HOME) $(BENCH_HOME) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup-demo:
	@tools/setup demo

setup-dev:
	@tools/setup dev
