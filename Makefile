# One entry for everything: `make help` lists the targets. Recipes are thin; the work is in the packages and in jobs/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON := .venv/bin/python
STAMP := .venv/installed
# Tests that share a cluster, a Spark session or a module run in one process, the long groups first: tests/conftest.py.
PROCESSES := -n 3 --dist loadgroup --no-loadscope-reorder
# Every script under jobs/ finds the environment through this variable.
export PYTHON

$(STAMP): pyproject.toml constraints.txt jobs/setup.sh
	@jobs/setup.sh
	@touch $@

.PHONY: help setup setup-gpu demo test test-unit soak test-gpu test-docker test-readme lint format docs look clean cluster-up cluster-down cluster-status \
  spark-preprocess spark-filter spark-sample spark-build spark-pack train convert-megatron convert-hf

help: ## this list
	@awk -F ' ## ' '/^[a-z-]+:.* ## / { sub(/:.*/, "", $$1); printf "  %-17s %s\n", $$1, $$2 } \
	  /^#example / { printf "  %-17s   %s\n", "", substr($$0, 10) }' Makefile

setup: $(STAMP) ## install .venv (exact versions of constraints.txt) and Java; a second call does no work
#example make setup

setup-gpu: $(STAMP) ## add Transformer Engine, which training on a GPU needs; part of it is compiled here
#example make setup-gpu
	@jobs/setup_gpu.sh

demo: $(STAMP) ## raw scans and text -> packs -> training -> Hugging Face -> score, all below demo/
#example make demo FAMILY=qwen3_vl
	@jobs/demo.sh $(FAMILY)

test: $(STAMP) ## all tests that need no GPU, in three processes
#example make test ARGS="-k resumed"
	@$(PYTHON) -m pytest $(PROCESSES) tests/unit tests/integration $(ARGS)

test-unit: $(STAMP) ## those that start no Spark, no HDFS and no torchrun: the inner loop
#example make test-unit
	@$(PYTHON) -m pytest $(PROCESSES) tests/unit $(ARGS)

test-readme: $(STAMP) ## README's commands from top to bottom, the demo too, in a copy of the repository
#example make test-readme
	@README_DEMO= $(PYTHON) -m pytest tests/integration/test_readme.py $(ARGS)

soak: $(STAMP) ## kill -9 a training run 40 times at random moments, 15 of them inside of a save; a quarter of an hour
#example make soak
	@SOAK_KILLS=40 $(PYTHON) -m pytest -s tests/integration/test_faults_runs.py -k killed_at_random $(ARGS)

test-gpu: $(STAMP) ## tests that need a CUDA machine
#example make test-gpu
	@$(PYTHON) -m pytest tests/gpu $(ARGS)

test-docker: $(STAMP) ## build the pipeline's image with buildah, as root on Debian, and run the demo's pipeline in it
#example make test-docker
	@docker/test.sh

lint: $(STAMP) ## ruff, mypy and the walls between the packages
#example make lint
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports

format: $(STAMP) ## let ruff rewrite what it can
#example make format
	@.venv/bin/ruff check --fix
	@.venv/bin/ruff format

# need-IN, need-OUT, ...: stop before anything else, with the target's example, unless the variable was given.
need-%:
	@[[ -n "$($*)" ]] || { sed -n '/^$(firstword $(MAKECMDGOALS)):/{n;s/^#example/$* is missing, usage:/p}' Makefile >&2; exit 2; }

spark-preprocess: need-IN need-OUT need-DATASET $(STAMP) ## raw rows -> checked samples and image blobs
#example make spark-preprocess IN=raw/digits OUT=work/preprocess DATASET=messages
	@jobs/spark_preprocess.sh "$$IN" "$$OUT" --dataset "$$DATASET" $(ARGS)

spark-filter: need-IN need-OUT $(STAMP) ## clean rows to data/, the others to quarantine/
#example make spark-filter IN=work/preprocess OUT=work/filter/digits
	@jobs/spark_filter.sh "$$IN" "$$OUT" $(ARGS)

spark-sample: need-IN need-OUT $(STAMP) ## choose copies of each sample by the ratio of its data path
#example make spark-sample IN=work/filter OUT=work/sample ARGS="--epoch 0"
	@jobs/spark_sample.sh "$$IN" "$$OUT" $(ARGS)

spark-build: need-IN need-OUT need-TOKENIZER need-LENGTH $(STAMP) ## tokens and loss mask
#example make spark-build IN=work/sample OUT=work/build TOKENIZER=Qwen2.5-VL-3B-Instruct LENGTH=8192
	@jobs/spark_build_dataset.sh "$$IN" "$$OUT" --tokenizer "$$TOKENIZER" --length "$$LENGTH" $(ARGS)

spark-pack: need-IN need-OUT need-LENGTH $(STAMP) ## whole samples into packs of LENGTH tokens: the kanyun dataset
#example make spark-pack IN=work/build OUT=packed LENGTH=8192
	@jobs/spark_packing.sh "$$IN" "$$OUT" --length "$$LENGTH" $(ARGS)

cluster-up: $(STAMP) ## HDFS and Spark as processes on this machine, to try the stages on
#example make cluster-up HDFS_PORT=9820 SPARK_PORT=7077 HDFS_WEB_PORT=9870 SPARK_WEB_PORT=8081
	@$(PYTHON) -m jobs.cluster up $(foreach port,HDFS_PORT SPARK_PORT HDFS_WEB_PORT SPARK_WEB_PORT,\
	  $(if $($(port)),--$(shell tr A-Z_ a-z- <<< $(port)) $($(port))))

cluster-down: $(STAMP) ## end them; what HDFS holds is there again after the next cluster-up
#example make cluster-down
	@$(PYTHON) -m jobs.cluster down

cluster-status: $(STAMP) ## how they are; exit code 1 unless all of them run
#example make cluster-status
	@$(PYTHON) -m jobs.cluster status

train: need-CONFIG $(STAMP) ## train on packs, on every GPU of this machine, or without one on its CPU
#example make train CONFIG=jobs/recipes/qwen2_5_vl_3b.yaml ARGS="data=packed output=runs/vl"
	@jobs/pretrain.sh "$$CONFIG" $(ARGS)

convert-megatron: need-IN need-OUT $(STAMP) ## a Hugging Face folder -> a checkpoint to start training from
#example make convert-megatron IN=Qwen2.5-VL-3B-Instruct OUT=checkpoints/qwen2_5_vl_3b
	@jobs/convert_to_megatron.sh "$$IN" "$$OUT" $(ARGS)

convert-hf: need-IN need-OUT $(STAMP) ## a checkpoint of ours -> a folder that transformers loads
#example make convert-hf IN=runs/vl OUT=runs/vl_hf
	@jobs/convert_to_huggingface.sh "$$IN" "$$OUT" $(ARGS)

docs: $(STAMP) ## the site of docs/ into site/, readable without a network; fails at a link that leads nowhere
#example make docs
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

look: docs ## the site and the pages below demo/ in Chromium, 400 and 1600 pixels wide; needs playwright, .[browser]
#example make look
	@$(PYTHON) -m docs.look site $(wildcard demo)

clean: ## remove what make made: .venv, demo/, caches
#example make clean
	rm -rf .venv demo site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info
