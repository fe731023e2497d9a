# `make demo` runs the embedded experiment, `make test` the tests. Both make .venv first, from the lock in envs/.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
CORES ?= $(shell nproc 2>/dev/null || echo 2)
# more arguments for snakemake, as `make demo ARGS="--forceall"`
ARGS ?=

.PHONY: demo unlock test test-fast test-slurm bench lint docs report reference lock clean

demo: $(VENV)/made
	snakemake --profile local --cores $(CORES) $(ARGS)

# take away the locks that a killed run left on this folder
unlock: $(VENV)/made
	snakemake --profile local --cores $(CORES) --unlock $(ARGS)

# files of tests side by side
test: $(VENV)/made
	pytest -n $(CORES) --dist loadfile $(ARGS)

# the mathematics alone, in two minutes
test-fast: $(VENV)/made
	pytest -n $(CORES) -m fast $(ARGS)

# on a real Slurm that lives on loopback while the tests run; as root, Debian's packages are installed for it.
# `make test-slurm SLURM=all` kills everything that can be killed (half an hour)
SLURM ?= short
test-slurm: $(VENV)/made
	pytest tests/slurm --slurm $(SLURM) $(ARGS)

bench: $(VENV)/made
	python tests/benchmarks/run.py
ifdef EDM
	python tests/benchmarks/edm.py $(EDM)
endif

lint: $(VENV)/made
	ruff check .
	ruff format --check .
	lint-imports
	basedpyright
	snakefmt --check workflow
	snakemake --lint

# the pages of docs/, into site/index.html. Not --quiet, which hides from --strict what it should fail on
docs: $(VENV)/made
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

# one page of tables and figures, results/report.html
report: $(VENV)/made
	snakemake --profile local --cores $(CORES) report $(ARGS)

# commit a run's tables and figures under results/reference/
reference: $(VENV)/made
	snakemake --profile local --cores $(CORES) reference_digits $(ARGS)

lock: $(VENV)/made
	uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate \
	    --custom-compile-command "make lock" pyproject.toml -o envs/requirements.txt
	python envs/environment.py < envs/requirements.txt > envs/environment.yaml

# the page of every key and the schema for editors, from the settings
config/README.md: $(wildcard anisodiff/experiment/settings/*.py) anisodiff/experiment/config.py $(VENV)/made
	python -m anisodiff describe-config > $@
	python -m anisodiff describe-config --schema > workflow/schemas/config.schema.json

clean:
	rm -rf results/digits results/report.html .snakemake

# k-diffusion without what it asks for: tests import its module of samplers, which needs none of it
$(VENV)/made: envs/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python -r envs/requirements.txt
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --editable .
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps k-diffusion==0.1.1.post1
	touch $@
