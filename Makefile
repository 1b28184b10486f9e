# The short way in. Plain meson works too: meson setup build && ninja -C build && meson test -C build
BUILD ?= build
# Passed to `meson setup`, and to `meson configure` of a build folder that is there already.
MESON_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?= host
TEST_ARGS ?=
QUALITY_ARGS ?=
# no: leave the tests of the engines' adapters out, which need torch and vLLM (850 MB to fetch).
ENGINES ?= yes

VENV = $(BUILD)/venv

all: build

setup:
	@.ci/setup packages

configure: setup
	@if [ ! -f $(BUILD)/build.ninja ]; then meson setup $(BUILD) $(MESON_ARGS); \
	elif [ -n "$(MESON_ARGS)" ]; then meson configure $(BUILD) $(MESON_ARGS); fi

build: configure
	ninja -C $(BUILD)

venv: configure
	@.ci/setup venv $(VENV)

# torch and the engines on the CPU, for the adapters' tests and client/examples/generate.py: 850 MB to fetch, 2.4 GB of disk.
venv-engines: configure
	@.ci/setup venv $(BUILD)/venv-engines client/python/requirements-engines.txt

test: build venv $(if $(filter yes,$(ENGINES)),venv-engines)
	@.ci/test $(BUILD) $(TEST_ARGS)

demo: build venv
	$(VENV)/bin/python client/examples/demo.py --build-dir $(BUILD) $(DEMO_ARGS)

# Mass and error of the signature schemes on a real model, a minute or two. QUALITY_ARGS="mass perplexity needles --model gemma3"
# and the like: --help tells.
quality: build venv
	@.ci/setup venv $(VENV) tests/quality/requirements.txt
	$(VENV)/bin/python tests/quality/quality.py --build-dir $(BUILD) $(QUALITY_ARGS)

# The Python package with the C library inside.
wheel: build venv
	PIVOTKV_LIBRARY=$(abspath $(BUILD))/client/libpivotkv.so $(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check \
	  --no-build-isolation --no-deps --no-index --wheel-dir $(BUILD)/wheel client/python
	@ls $(BUILD)/wheel/*.whl

bench: build
	$(BUILD)/client/cli/pivotkv bench $(BENCH_ARGS)

install: build
	meson install -C $(BUILD)

clean:
	rm -rf $(BUILD) build-asan build-tsan build-ci

.PHONY: all setup configure build venv venv-engines test demo quality wheel bench install clean
