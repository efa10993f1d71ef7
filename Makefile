# make demo | test | export | readme | page | docs | clean. The virtual environment is made and filled when it is missing or too old.
VENV ?= .venv
PYTHON ?= python3.11
WORKERS ?= 2
BIN := $(VENV)/bin
PACKAGING := settings.ini pyproject.toml setup.py

.PHONY: demo test export readme page docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/hyperlatent demo --out runs/demo --seed 0

test: $(VENV)/.installed-dev
	@command -v chromium >/dev/null || (apt-get -qq update && apt-get -qq install -y chromium) || \
		echo "The browser tests need chromium and it could not be installed: install it, or set CHROMIUM to its path." >&2
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# notebooks -> package and README.md
export: $(VENV)/.installed-dev
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/readme.py

# nbs/index.ipynb (and the line under every notebook's title) -> README.md
readme: $(VENV)/.installed-dev
	$(BIN)/python tools/readme.py

# the explorer's page that needs no kernel, part of the site
page: $(VENV)/.installed-dev
	$(BIN)/python tools/explorer_page.py

# the site, into _docs/; look at it with: python -m http.server -d _docs
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# caches and build products; runs/ is yours and stays
clean:
	rm -rf build dist _docs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find hyperlatent nbs tests tools -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# stamps: installed again only after the packaging files have changed
$(VENV)/.installed: $(PACKAGING) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[explore,tracking]"
	touch $@

$(VENV)/.installed-dev: $(PACKAGING) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(VENV)/.installed $@
