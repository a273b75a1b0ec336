# Each line that begins with "## " is printed by `make` alone.
## make demo      install, then preprocess, train and generate on the data in demo/ (CPU, about three minutes)
## make test      the tests that every change runs (about two minutes on two idle cores)
## make test-all  all tests, the slow ones too
## make check     lint and types
## make format    format the code, and mend what the linter can

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := demo_run

.PHONY: help demo test test-all check format bench audit clean

help:
	@sed -n 's/^## //p' Makefile

demo: $(VENV)/installed
	$(PY) preprocess_latents.py --config configs/demo.yaml --output_folder $(RUN)/latents_cache
	$(PY) train_latent_cfg.py --config configs/demo.yaml --latents_cache_folder $(RUN)/latents_cache --results_folder $(RUN)/results
	$(PY) generate.py --config configs/demo.yaml --checkpoint $(RUN)/results --output_folder $(RUN)/synthetic

test: $(VENV)/installed-dev
	$(PY) -m pytest

test-all: $(VENV)/installed-dev
	$(PY) -m pytest --all

# make test with the versions that users have: test-kaggle, test-colab, test-lowest, each in an environment of its own.
test-%: .venv-%/installed
	.venv-$*/bin/python -m pytest

check: $(VENV)/installed-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright

format: $(VENV)/installed-dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# The benchmarks at tiny sizes, which only shows that they run; without --small each measures.
bench: $(VENV)/installed
	for name in encode train lazy start open ranks; do $(PY) benchmarks/bench_$$name.py --small --rounds 2 || exit 1; done
	$(PY) benchmarks/bench_sample.py --small --seeds 2
	$(PY) benchmarks/bench_gpu.py --small --output_folder $$(mktemp -d)
	$(PY) benchmarks/bench_usefulness.py --small

# Looks the pinned packages up among the known vulnerabilities, which needs the network; fails where it cannot.
audit: $(VENV)/installed
	$(PY) -m pip install --quiet pip-audit
	$(PY) -m pip_audit -r constraints.txt --no-deps --disable-pip --strict

$(VENV)/installed: requirements.txt constraints.txt
	@echo "installing into $(VENV), which takes some minutes"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

.venv-%/installed: constraints/%.txt requirements.txt requirements-dev.txt
	python=$$(.ci/find_python $$(sed -n 's/^# Python //p' $<)) && $$python -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt -c $<
	touch $@

clean:
	rm -rf $(VENV) .venv-* $(RUN)
