# make demo   train a small model in front of your eyes, and read what it writes (some minutes on 2 cores)
# make play   the demo's model (trained if it is not there) on a page in your browser
# make chat   teach the demo's model (trained if it is not there) to follow instructions, and talk to it
# make test   all tests that need no PyTorch (of thousands of alike inputs a tenth; all: pytest --exhaustive)
# make test-interop  the exported models in PyTorch: installs it (the extra interop), and tests against it
# make test-tpu  training steps, compiled by TPUs' own compiler (Linux on x86-64; 700 MB, seven minutes on 2 cores)
# make faults real faults on real processes (kills, a full disk, damaged files): half an hour at the most
# make lint   formatting and linting
# make bench  the benchmarks, with what they are measured against
# make clean  the virtual environment and the demos' models are removed; other models stay

PYTHON ?= python3
VENV ?= .venv
export PIP_USER = 0
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo play chat test test-interop test-tpu faults lint bench clean
demo: $(VENV)/core
	$(VENV)/bin/python -m transformer_lm.demo

play: $(VENV)/serve
	test -e logs/demo/summary.json || $(VENV)/bin/python -m transformer_lm.demo
	$(VENV)/bin/python -m transformer_lm.serve --workdir=logs/demo --model_name=mukashi

chat: $(VENV)/core
	$(VENV)/bin/python -m transformer_lm.demo_chat

test: $(VENV)/dev
	$(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --ignore=tests/interop

test-interop: $(VENV)/interop
	$(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile tests/interop

test-tpu: $(VENV)/libtpu
	PYTHONPATH=$< $(VENV)/bin/python -m pytest tests/training/test_ahead.py

faults: $(VENV)/dev
	$(VENV)/bin/python tests/faults/faults.py

lint: $(VENV)/dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

bench: $(VENV)/interop
	$(VENV)/bin/python benchmarks/generate.py
	$(VENV)/bin/python benchmarks/train_step.py
	$(VENV)/bin/python benchmarks/prepare.py
	$(VENV)/bin/python benchmarks/start.py

clean:
	rm -rf $(VENV) logs/demo logs/chat

# One virtual environment; an empty file in it says which extras are installed. It is made anew when it is half-made;
# what somebody has installed into it besides stays.
$(VENV)/core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -e $@ || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/dev $(VENV)/interop $(VENV)/serve: $(VENV)/core
	$(PIP) --editable ".[$(notdir $@)]"
	touch $@

# Beside the others: where JAX finds it, it looks for TPUs whenever it starts.
$(VENV)/libtpu: $(VENV)/dev
	$(PIP) --no-deps --upgrade --target $@ libtpu
	touch $@
