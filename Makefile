# make demo    install, then preprocess, train and generate on the ready-made data in demo/ (CPU, about three minutes)
# make test    install what the tests need, and run them
# make faults  the long form of the fault suite in tests/faults
# make bench   show that the benchmarks run, at tiny sizes; without --small each measures
# make check   lint and type-check
# make audit   look the pinned packages up among the known vulnerabilities (needs the network)
# make clean   remove the environment and what the demo made

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := demo_run

.PHONY: demo test faults bench check audit format clean

demo: $(VENV)/installed
	$(PY) preprocess_latents.py --config configs/demo.yaml --output_folder $(RUN)/latents_cache
	$(PY) train_latent_cfg.py --config configs/demo.yaml --latents_cache_folder $(RUN)/latents_cache --results_folder $(RUN)/results
	$(PY) generate.py --config configs/demo.yaml --checkpoint $(RUN)/results --output_folder $(RUN)/synthetic

test: $(VENV)/installed-dev
	$(PY) -m pytest

faults: $(VENV)/installed-dev
	$(PY) -m pytest tests/faults --long

bench: $(VENV)/installed
	for name in encode train lazy start open ranks; do $(PY) benchmarks/bench_$$name.py --small --rounds 2 || exit 1; done
	$(PY) benchmarks/bench_sample.py --small --seeds 2

check: $(VENV)/installed-dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright

audit: $(VENV)/installed
	$(PY) -m pip install --quiet pip-audit
	$(PY) -m pip_audit -r constraints.txt --no-deps --disable-pip

format: $(VENV)/installed-dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

$(VENV)/installed: requirements.txt constraints.txt
	@echo "installing into $(VENV), which takes some minutes"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(PY) -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(RUN)
