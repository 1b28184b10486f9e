# The two commands of the README, and their friends. Plain meson works too: meson setup build && ninja -C build.
BUILD ?= build
DEMO_ARGS ?=
PYTHON = $(BUILD)/venv/bin/python

.PHONY: all setup test demo bench install clean venv

all: setup
	ninja -C $(BUILD)

# Installs what is missing (apt packages) and configures once.
setup:
	@sh .ci/setup packages
	@test -f $(BUILD)/build.ninja || meson setup $(BUILD)

venv: setup
	@sh .ci/setup venv $(BUILD)/venv

test: all
	@sh .ci/test $(BUILD)

demo: all venv
	$(PYTHON) client/examples/demo.py --build-dir $(BUILD) $(DEMO_ARGS)

bench: all
	$(BUILD)/client/cli/pivotkv bench host

install: all
	meson install -C $(BUILD) --no-rebuild

clean:
	rm -rf $(BUILD)
