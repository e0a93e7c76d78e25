PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test test-all bench docs lint format clean setup

demo: $(STAMP)
	$(BIN)/palimpsest demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2

bench: $(STAMP)
	$(BIN)/python benchmarks/audit_cost.py

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(STAMP)

# torch goes first and pinned, so that no resolver picks another release. Whether the CPU or the CUDA build comes is up to
# the configured package index; either works, and a CPU is enough.
# lm-evaluation-harness only runs its own tasks on tuned models; the peers only check our readers and writers of their formats; without them those tests skip. dictionary-learning comes
# without what it asks for (an nnsight that brings another torch): its dictionaries need torch alone.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs,web,trl,gguf,tensorboard]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[sae-lens]" \
		|| echo "sae-lens could not be installed: the tests that compare with it will be skipped"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[peers]" \
		&& $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps dictionary-learning==0.1.0 \
		|| echo "sparsify or dictionary_learning could not be installed: the tests that compare with them will be skipped"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lm-eval]" \
		|| echo "lm-eval could not be installed: the tests that run its tasks will be skipped"
	touch $(STAMP)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis site dist build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
