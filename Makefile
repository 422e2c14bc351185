# Everything runs in .venv, created here from wheels; no ROS installation and no root are needed.
# With a ROS desktop use colcon in ros2_ws instead (see README.md).

# CPython 3.11: the ROS wheels exist for no other version
PYTHON ?= python3.11
# an extra wheel index for torch, e.g. https://download.pytorch.org/whl/cpu (small) or .../whl/cu126
TORCH_INDEX ?=
# make demo: a nuScenes folder, its version and where pictures go; empty = what demo/run.py chooses
DATAROOT ?=
VERSION ?=
OUT ?=
# make test: extra pytest arguments, e.g. PYTEST_ARGS="-k geometry"
PYTEST_ARGS ?=

VENV := .venv
ABS_VENV := $(abspath $(VENV))
PY := $(ABS_VENV)/bin/python
LOCK := requirements/lock-py311.txt
PIP := $(PY) -m pip --disable-pip-version-check
BUILD := ros2_ws/build
VENV_STAMP := $(VENV)/.stamp-venv
BUILD_STAMP := $(BUILD)/.stamp-build
PROFILE := $(abspath ros2_ws/src/nmp/nmp/config/fastdds_loopback.xml)
# Python sources are not listed: they are installed as links, so edits are live
BUILD_INPUTS := $(shell find ros2_ws/src/nmp_msgs underlay -type f) \
	$(wildcard ros2_ws/src/nmp/package.xml ros2_ws/src/nmp/setup.* launch/*.launch.py rviz/*.rviz \
	ros2_ws/src/nmp/nmp/config/*) scripts/need_tf2_msgs.py

export FASTRTPS_DEFAULT_PROFILES_FILE := $(PROFILE)
export FASTDDS_DEFAULT_PROFILES_FILE := $(PROFILE)
export ROS_AUTOMATIC_DISCOVERY_RANGE := LOCALHOST
# where the ament index, and with it share/nmp, is found
export AMENT_PREFIX_PATH := $(ABS_VENV)
# a sourced ROS installation, or another environment of wheels, would be mixed into this one
unexport PYTHONPATH PYTHONHOME CMAKE_PREFIX_PATH COLCON_PREFIX_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE

.DEFAULT_GOAL := help
.PHONY: help venv build demo test lint format clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

venv: $(VENV_STAMP) ## create .venv (again when its requirements change)

build: $(BUILD_STAMP) ## build the ROS 2 workspace into .venv; nothing to source afterwards

demo: build ## record, map and draw a short drive; DATAROOT=, VERSION=, OUT= choose the data
	$(PY) demo/run.py \
		$(if $(DATAROOT),--dataroot "$(DATAROOT)") $(if $(VERSION),--version "$(VERSION)") $(if $(OUT),--out "$(OUT)")

test: build ## run the tests, on real ROS 2 topics
	ROS_PYTHON_CHECK_FIELDS=1 $(PY) -m pytest tests $(PYTEST_ARGS)

lint: $(VENV_STAMP) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV_STAMP) ## let ruff put the sources in order
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove the build and what runs left behind (.venv stays: rm -rf .venv)
	rm -rf $(BUILD) ros2_ws/install ros2_ws/log build dist log .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0r rm -rf

$(VENV_STAMP): pyproject.toml $(LOCK) scripts/fix_wheel_cmake_paths.py
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11)' 2>/dev/null || { echo "Python 3.11 is missing (the ROS wheels need exactly it): apt install python3.11 python3.11-venv, uv python install 3.11, or make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv module is missing: apt install python3.11-venv" >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c $(LOCK) setuptools wheel
	$(if $(TORCH_INDEX),$(PIP) install -q -c $(LOCK) --index-url $(TORCH_INDEX) torch)
	$(PIP) install -q -c $(LOCK) --no-build-isolation -e '.[ros,train,lanelet2,fleet,view,dev]'
	$(PY) scripts/fix_wheel_cmake_paths.py
	$(PIP) check
	@touch $@

# Interface packages are copied into .venv, which the wheels' bootstrap puts on LD_LIBRARY_PATH; nmp is only linked
# there. Its metadata goes along because the executables in lib/nmp look up their entry point in it.
COLCON = PATH="$(ABS_VENV)/bin:$$PATH" CMAKE_PREFIX_PATH="$(ABS_VENV)" \
	$(PY) -m colcon --log-base ros2_ws/log build --build-base $(BUILD) --install-base $(VENV) --merge-install

$(BUILD_STAMP): $(VENV_STAMP) $(BUILD_INPUTS)
	@command -v cmake >/dev/null && command -v make >/dev/null || { echo "cmake is missing: apt install cmake" >&2; exit 1; }
	@command -v gcc >/dev/null && command -v g++ >/dev/null || { echo "gcc is missing: apt install build-essential" >&2; exit 1; }
	@$(PY) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || { echo "Python's headers are missing: apt install python3.11-dev" >&2; exit 1; }
	underlay=$$($(PY) scripts/need_tf2_msgs.py >/dev/null && echo underlay/tf2_msgs || true); \
	$(COLCON) --base-paths ros2_ws/src/nmp_msgs $$underlay \
		--cmake-args -DBUILD_TESTING=OFF -DPython3_EXECUTABLE=$(PY)
	$(COLCON) --base-paths ros2_ws/src/nmp --symlink-install
	rm -rf $(VENV)/lib/python3.11/site-packages/nmp.egg-info
	cp -r $(BUILD)/nmp/nmp.egg-info $(VENV)/lib/python3.11/site-packages/
	@touch $@
