# make train   sets up .venv, trains configs/tiny.yaml on a CPU in minutes, evaluates it, writes runs/tiny/report.html
# make test    sets up .venv, checks style and types, runs every test
# make gpu     on a machine with a GPU: what only it can tell, in under ten minutes, in the environment of PYTHON as it is
# A second call of the first two installs nothing; a second `make train` finds the finished run and prints its tables again.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# The extension is compiled again where its sources changed since; tests compile csrc/cuda themselves.
COMPILED := $(VENV)/.compiled
SOURCES := $(wildcard csrc/host/*) csrc/build.py
# Nothing of the caller's own environment takes part.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_USER
export PYTHONNOUSERSITE := 1

.PHONY: train test gpu install clean
.DELETE_ON_ERROR:

train: $(COMPILED)
	$(PY) -m mvle.train tiny
	$(PY) -m mvle.evaluate all runs/tiny
	$(PY) -m mvle.report runs/tiny

test: $(COMPILED)
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest tests

# No network, no .venv: torch is the one that the machine has. WHEELS=folder brings small packages that it lacks.
gpu:
	env -u PYTHONNOUSERSITE PYTHONPATH='$(PYTHONPATH)' $(PYTHON) -m benchmarks.gpu $(if $(WHEELS),--wheels '$(WHEELS)')

install: $(COMPILED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 15) else \
	    "mvle needs Python 3.11 to 3.14; got %d.%d from $(PYTHON). Name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools pybind11
	@rm -f mvle/_host*.so
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --no-build-isolation --editable '.[test]'
	@touch $@

# Where nothing can be compiled, setup.py says so and the twin in Python serves: never what older sources gave.
$(COMPILED): $(INSTALLED) $(SOURCES)
	@if [ -n "$$(find $(SOURCES) -newer $(INSTALLED))" ]; then \
	    rm -f mvle/_host*.so build/lib*/mvle/_host*.so; \
	    echo "$(PY) setup.py --quiet build_ext --inplace"; $(PY) setup.py --quiet build_ext --inplace; \
	fi
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/mvle_kernels/native.json mvle/_host*.so kernels/mvle_kernels/libmvle_cuda.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
