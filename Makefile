# make         create the environment and run the embedded study: tables and figures in results/
# make test    run the tests
# make cluster run the tests on a Slurm cluster of two nodes on this machine (sudo tests/cluster/install.sh installs Slurm)
# make lint    check style, types and the DAG
# make rehearsal  run the paper's study in small: a local host of the data, a local hub, and every phase
# make bench   run the benchmarks, on the study of params.yaml (after make) and on a GPU if there is one
# make full    run the embedded study and all sweeps, with several seeds of training
# make clean   remove the study's outputs (DVC's cache keeps a copy)
# make lock    write requirements.txt from the environment

PYTHON ?= python3
INSTALLED := .venv/installed
STUDY := $(shell sed -n "s/^study: *\([^ ]*\).*/\1/p" params.yaml)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONUNBUFFERED := 1

.PHONY: all test cluster rehearsal lint bench full clean lock

all: $(INSTALLED)
	dvc repro
	@echo "Tables and figures: results/$(STUDY)/tables/index.html"

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	@echo "Installing the environment into .venv: about two minutes"
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

test: $(INSTALLED)
	OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist loadfile --ignore tests/cluster

cluster: $(INSTALLED)
	OMP_NUM_THREADS=1 pytest tests/cluster

rehearsal: $(INSTALLED)
	rm -rf work/rehearsal
	PYTHONPATH=tests python -m rehearsal work/rehearsal

lint: $(INSTALLED)
	ruff check src tests benchmarks
	ruff format --check src tests benchmarks
	mypy
	snakefmt --check Snakefile workflow
	snakemake --lint
	genseg dvc --check

bench: $(INSTALLED)
	python -m benchmarks.run
	if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then python -m benchmarks.gpu; fi

full: all
	for sweep in seeds architecture objectives; do snakemake --cores all --config sweep=sweeps/$$sweep.yaml || exit; done
	snakemake --cores all

clean:
	rm -rf data/$(STUDY) results/$(STUDY) work/$(STUDY)

lock: $(INSTALLED)
	{ sed -n '/^#/p' requirements.txt; pip freeze --exclude-editable | sed 's/+.*//'; } > requirements.new
	mv requirements.new requirements.txt
