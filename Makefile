# Everything happens in .venv, made from the pinned requirements by the first target that needs it.
# Paths are relative on purpose: the clone may lie in a folder whose name has spaces.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check $(if $(CI),--quiet)
PYTEST := $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
ARGS ?=
RIVALS ?= $(HOME)/.cache/spq-serve/rivals
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help serve test test-scale test-vllm check coverage bench compare image clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "ARGS=\"...\" is passed on; every option of serve is also a variable: make serve SPQ_PORT=9000"

serve: $(VENV)/.runtime ## Serve demo/storyteller, or SPQ_MODEL, on port 8000
serve: export SPQ_MODEL ?= demo/storyteller
serve:
	@exec $(RUN) -m server $(ARGS)

test: $(VENV)/.dev $(VENV)/.clients $(VENV)/.node $(VENV)/.prometheus ## Run the whole test suite
	@HF_HUB_OFFLINE=1 $(PYTEST) $(ARGS)

test-scale: $(VENV)/.ray ## Run the tests of server.ray_app: Ray with two nodes on this machine
	@HF_HUB_OFFLINE=1 $(VENV)/ray/bin/python -m pytest tests/ray $(ARGS)

test-vllm: $(VENV)/.dev ## Test the vLLM plugin; SPQ_VLLM names a Python with vLLM, which is left as it is
	@test -n "$(SPQ_VLLM)" || { echo "say make test-vllm SPQ_VLLM=/path/to/python (of an environment with vLLM)" >&2; exit 1; }
	"$(SPQ_VLLM)" -m venv $(VENV)/vllm
	@"$(SPQ_VLLM)" -c 'import site; print("\n".join(site.getsitepackages()))' > "$$($(VENV)/vllm/bin/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-base.pth"
	$(VENV)/vllm/bin/python -m pip install --no-deps --ignore-installed --editable . --editable integrations/vllm zstandard==0.25.0
	@SPQ_VLLM_PYTHON="$(CURDIR)/$(VENV)/vllm/bin/python" $(RUN) -m pytest tests/integrations $(ARGS)

check: $(VENV)/.dev $(VENV)/.clients $(VENV)/.node $(VENV)/.prometheus ## Lint, check the format and the types, and run the tests that need no GPU
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	@HF_HUB_OFFLINE=1 $(PYTEST) -m "not gpu and not program" $(ARGS)

coverage: $(VENV)/.dev $(VENV)/.clients $(VENV)/.node $(VENV)/.prometheus ## Which lines of server/ its tests run; one process, half an hour
	@$(RUN) -m coverage erase
	@HF_HUB_OFFLINE=1 $(RUN) -m coverage run -m pytest tests/server $(ARGS)
	@$(RUN) -m coverage combine --quiet
	@$(RUN) -m coverage report

bench: $(VENV)/.runtime ## Time the kernels on this machine
	@exec $(RUN) -m kernels.bench $(ARGS)

compare: $(VENV)/.loadtest ## The server beside llama.cpp, vLLM and transformers on this machine: installs them in RIVALS, writes report/
	@OURS=$(RUN) PYTHON=$(PYTHON) loadtest/install_rivals.sh "$(RIVALS)"
	@$(RUN) -m loadtest.compare --model "$(RIVALS)/model" --rivals "$(RIVALS)" --cache "$(RIVALS)/cache" \
		--servers ours,ours-int4,llama.cpp-q8_0,llama.cpp-q4_0,vllm-gptq4,vllm-float32,transformers-gptq4 --rounds 2 \
		--note "Random weights tell speed and memory. Quality, on trained models: docs/results.md." $(ARGS)

image: ## Build the cpu container image without Docker, run it and check it (buildah, podman, root)
	@deploy/build_image.sh

clean: ## Remove .venv and caches (compressed models in the cache folder stay)
	rm -f kernels/native/*.so
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	find kernels spq server loadtest benchmarks demo tests -name __pycache__ -prune -exec rm -rf {} +

# The stamps below are touched last, so an install that was cut short is done again.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; install Python 3.11 or newer, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), but 3.11 or newer is needed; say make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: requirements.txt pyproject.toml $(wildcard kernels/native/*.[ch]) $(VENV)/.created
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-eval.txt requirements-loadtest.txt $(VENV)/.runtime
	$(PIP) install -r requirements-dev.txt -r requirements-eval.txt -r requirements-loadtest.txt
	@touch $@

$(VENV)/.loadtest: requirements-loadtest.txt $(VENV)/.runtime
	$(PIP) install -r requirements-loadtest.txt
	@touch $@

# Clients that tests talk to a server with: LiteLLM wants other versions than ours, so it gets an environment of its own.
$(VENV)/.clients: requirements-clients.txt $(VENV)/.created
	$(RUN) -m venv --without-pip $(VENV)/clients
	$(PIP) --python $(VENV)/clients/bin/python install --no-deps --no-compile -r requirements-clients.txt
	@touch $@

# Ray and what it brings, half of what .venv takes, in an environment of its own that sees .venv's packages too.
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
$(VENV)/.ray: requirements-ray.txt $(VENV)/.dev
	$(RUN) -m venv --without-pip $(VENV)/ray
	$(PIP) --python $(VENV)/ray/bin/python install --no-deps --no-compile -r requirements-ray.txt
	@$(RUN) $(SITE) > "$$($(VENV)/ray/bin/python $(SITE))/venv.pth"
	@touch $@

# Without npm, or where it reaches no registry, the tests of the Node client skip by name.
NODE := tests/server/clients/node
$(VENV)/.node: $(NODE)/package.json $(NODE)/package-lock.json $(VENV)/.created
	@mkdir -p $(VENV)/node && cp $(NODE)/package.json $(NODE)/package-lock.json $(VENV)/node
	@if command -v npm >/dev/null; then npm ci --prefix $(VENV)/node --ignore-scripts --no-audit --no-fund && touch $@ || \
		echo "npm could not install the Node client; its tests skip" >&2; fi

# No package index of Python or Node has Prometheus: the distribution's is unpacked here, nothing is installed and no root
# needed. Without apt, or where it reaches no mirror, the tests that need it skip by name.
PROMETHEUS := $(VENV)/prometheus
APT := apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Dir::State::Lists="$(CURDIR)/$(PROMETHEUS)/lists" \
	-o Dir::Cache="$(CURDIR)/$(PROMETHEUS)/cache"
$(VENV)/.prometheus: $(VENV)/.created
	@if command -v prometheus >/dev/null && command -v promtool >/dev/null; then touch $@; else \
		mkdir -p $(PROMETHEUS)/lists/partial $(PROMETHEUS)/cache/archives/partial && cd $(PROMETHEUS) && \
		$(APT) update && $(APT) download prometheus && dpkg-deb --extract prometheus_*.deb . && rm -rf lists cache *.deb && \
		touch "$(CURDIR)/$@" || echo "prometheus could not be fetched; its tests skip" >&2; fi
