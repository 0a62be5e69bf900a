# Every target works alone on a fresh clone with Python 3.11 or newer and git (bench: npm and a C++ compiler, too); what else it needs
# is installed into .venv first.

PYTHON ?= python3
# On Linux PyPI's torch brings CUDA, some gigabytes. For the small CPU build: make TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# The checks also build TensorRT plans if you ask for NVIDIA's library, which is not open source: EXTRAS=cpu,openvino,trt,bench,dev
EXTRAS ?= cpu,openvino,bench,dev
BIN := .venv/bin
COMMA := ,
READY := .venv/.ready-$(subst $(COMMA),-,$(EXTRAS))

.PHONY: .venv demo test slow coverage lint bench clean distclean

.venv: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

demo: $(READY)
	$(BIN)/cpserve demo --out demo

test: $(READY)
	$(BIN)/pytest

# minutes of work or gigabytes of memory: Stable Diffusion 1.5 at full width, torch.compile
slow: $(READY)
	$(BIN)/pytest -m slow -n 0

coverage: $(READY)
	$(BIN)/pytest --cov --cov-report=term-missing:skip-covered

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/lint-imports
	$(BIN)/python tools/cli_reference.py --check
	$(BIN)/python tools/wheel_contents.py

# Not here: what needs pictures of your own, a person's eye, other environments or 20 GB (photos, killed, judge, training, optimum, wide)
# and what takes hours (labels).
BENCHMARKS := store latency swap teach forgetting

bench: $(READY)
	$(BIN)/python tools/emoji64/sources.py
	$(BIN)/python tools/emoji64/render.py
	@set -e; for each in $(BENCHMARKS); do echo "== $$each"; $(BIN)/python benchmarks/$$each.py $(if $(filter forgetting,$$each),--quick); done

clean:
	rm -rf demo out dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# build/ holds hours of work: drawings, checkpoints of training, benchmarks that go on where they were
distclean: clean
	rm -rf build .venv
