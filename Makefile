# The project's commands. `make` alone lists them.
.DEFAULT_GOAL := help
BIN := .venv/bin
LAB := python3 tests/lab/lab.py
# molecule looks for ansible beside itself; the lab is the inventory by default.
export PATH := $(CURDIR)/$(BIN):$(PATH)
PYTHON_FILES := server tests roles agents
SHELL_FILES := $(shell git ls-files '*.sh' tests/lab/images/apk .ci/run)

help: ## list the commands
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

demo: ## bare host to a real reply over a real tailnet, all on this machine
	@$(LAB) demo

test: lint unit lab molecule ## lint, unit tests, the lab, molecule, end-to-end tests
	@$(BIN)/pytest tests/e2e

lint: controller ## ruff, mypy, shellcheck, ansible-lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(PYTHON_FILES)
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/ansible-lint --offline -q

unit: controller ## the tests that need no Docker: seconds
	$(BIN)/pytest -q tests/unit

lab: ## build and start the internet in a box, the bare host and the laptop
	@$(LAB) up

molecule: lab ## the roles that own a bare host each
	MOLECULE_GLOB='tests/molecule/*/molecule.yml' $(BIN)/molecule test --all

shell: lab ## a shell on the laptop, which is on the tailnet
	@docker exec -it lab-laptop bash

bench: lab ## how long the commands take on a lab that is up, as a table in docs/
	@$(BIN)/python tests/benchmarks/commands.py

bench-cold: controller ## the same from nothing, in fresh clones: half an hour
	@python3 tests/benchmarks/commands.py --cold

docs: controller ## roles/README.md from the roles' argument specifications
	$(BIN)/python tests/role_tables.py

lock: controller ## requirements.txt from requirements.in
	$(BIN)/uv pip compile -q --generate-hashes --no-emit-index-url --python-version 3.11 --universal --no-header requirements.in -o requirements.txt

down: ## remove every container, network, volume and process that the commands made
	@$(LAB) down

clean: ## make down, then the images and the git-ignored cache
	@$(LAB) clean

controller:
	@tests/controller.sh

.PHONY: $(shell sed -nE 's/^([a-z-]+):.*/\1/p' Makefile)

# The steps of `make test` follow each other, with -j too.
.NOTPARALLEL:
