# make demo   trains, exports and looks at a small model on real images; no download of data
# make pixels trains a pixel-by-pixel model of digits, and draws some with it
# make test   the test suite;  make test-all  also what is long; stopped and called again, it goes on
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
DEMO := runs/digits

.PHONY: install demo pixels test test-all lint docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,data,onnx,dev]'
	touch $@

demo: install
	$(BIN)/python train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml --output $(DEMO)
	$(BIN)/python export_onnx.py --checkpoint $(DEMO)/best.pt --path $(DEMO)/model.onnx
	$(BIN)/python show_attention.py --checkpoint $(DEMO)/best.pt --path $(DEMO)/attention.png
	$(BIN)/python report.py --run $(DEMO)

pixels: install
	$(BIN)/python train_pixels.py --config configs/digits_pixels.yaml --output runs/pixels

test: install
	$(BIN)/python -m pytest -m 'not slow'

test-all: install
	$(BIN)/python -m pytest --go-on

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: install
	$(BIN)/python -m vision_attn readme README.md

clean:
	rm -rf .venv build dist *.egg-info runs
