# `make demo` and `make test` first set up the environment in .venv, unless it is up to date.

PYTHON ?= python3
VENV := .venv
# Further arguments for pip install, such as another index for PyTorch: see docs/install.md.
PIP_ARGS :=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALLATION := $(shell find balanced_d2/installation -name '*.py')
DEMO_CONFIG := configs/Demo/balanced_faster_rcnn_R_18_FPN.yaml
DEMO_OUTPUT := output/demo

.PHONY: demo test test-fast soak lint docs benchmark setup check-fresh clean

demo: $(READY)
	rm -rf $(DEMO_OUTPUT)
	DETECTRON2_DATASETS=datasets $(BIN)/python train_net.py --config-file $(DEMO_CONFIG) \
		OUTPUT_DIR $(DEMO_OUTPUT)
	DETECTRON2_DATASETS=datasets $(BIN)/python tools/contact_sheet.py \
		$(DEMO_OUTPUT)/inference/coco_instances_results.json \
		--dataset balanced_shapes_val --output $(DEMO_OUTPUT)/contact_sheet.png
	@echo
	@echo "The demo is done. Look at"
	@echo "  $(DEMO_OUTPUT)/contact_sheet.png    ground truth beside detections"
	@echo "  $(DEMO_OUTPUT)/model_final.pth      the trained model"
	@echo "  $(DEMO_OUTPUT)/metrics.json         losses, sampling counts and AP (also for TensorBoard)"
	@echo "  $(DEMO_OUTPUT)/inference/           detections in COCO's format"
	@echo "  $(DEMO_OUTPUT)/log.txt, config.yaml what was run"
	@echo "  datasets/balanced_shapes/           the data it was trained on"

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# For daily work: only the tests that take a few seconds at most.
test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Long runs of the kill and property tests and of damaged data, about 40 minutes on two cores, and
# of exported files on many images and of packages of every kind of model, hours.
soak: $(READY)
	NUM_KILLS=30 HYPOTHESIS_EXAMPLES=5000 $(BIN)/python -m pytest -n 2 \
		tests/test_reliability.py tests/test_properties.py tests/test_formats_properties.py
	EXPORT_IMAGES=300 $(BIN)/python -m pytest tests/test_export_fuzz.py tests/test_export_aoti.py

lint: $(READY)
	$(BIN)/ruff check --line-length 100 --select E,F,W,I,B,UP,SIM,C4 \
		--ignore B905,UP006,UP035,UP045 --per-file-ignores "configs/*:F401"
	$(BIN)/ruff format --line-length 100 --check
	$(BIN)/mypy

benchmark: $(READY)
	$(BIN)/python tools/benchmark.py

setup: $(READY)

# A broken link, or a docstring that cannot be read, is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The documentation is in site/index.html"

# The README's two commands on minimal machines.
check-fresh:
	$(PYTHON) tools/check_fresh.py

$(READY): requirements.txt setup.cfg setup.py pyproject.toml $(INSTALLATION)
	$(PYTHON) balanced_d2/installation/set_up.py --venv $(VENV) --pip-args='$(PIP_ARGS)'

# Only what the targets above make: output/ also has the trainings of whoever works here.
clean:
	rm -rf $(VENV) $(DEMO_OUTPUT) site datasets/balanced_shapes
