# The project's commands. `make` alone lists them.
.DEFAULT_GOAL := help
BIN := .venv/bin
LAB := python3 tests/lab/lab.py
# molecule looks for ansible beside itself; the lab is the inventory by default.
export PATH := $(CURDIR)/$(BIN):$(PATH)
PYTHON_FILES := server tests roles playbooks agents
SHELL_FILES := $(shell git ls-files '*.sh' tests/lab/images/apk .ci/run '*/postinst' '*/prerm' '*/postrm' '*/usr/bin/*' '*/nvidia-smi')

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

molecule: lab ## the roles that every host needs, on a bare Debian 13 each; make matrix has the rest
	MOLECULE_GLOB='tests/molecule/*/molecule.yml' $(BIN)/molecule test -s checkout -s docker -s preflight

matrix: lab ## what make test is too short for: both Debians, both sources of Docker, GPUs (ROWS=nvidia: those alone); a table in docs/
	@PYTHONPATH=tests/lab $(BIN)/python tests/matrix.py $(if $(ROWS),'$(ROWS)')

faults: lab ## break one part after another of the stack on the lab's host; how long it was away, as a table in docs/ (ROWS=killed: those alone)
	@PYTHONPATH=tests/lab:tests/e2e:tests $(BIN)/python tests/faults.py $(if $(ROWS),'$(ROWS)')

shell: lab ## a shell on the laptop, which is on the tailnet
	@docker exec -it lab-laptop bash

bench: lab ## how long a bare host takes, the commands on a lab that is up, replacing adapters, and updates, as tables in docs/
	@PYTHONPATH=tests:tests/lab $(BIN)/python tests/benchmarks/deployment.py
	@PYTHONPATH=tests $(BIN)/python tests/benchmarks/commands.py
	@PYTHONPATH=server:tests:tests/lab:tests/e2e:roles/lora/filter_plugins $(BIN)/python tests/benchmarks/adapters.py
	@PYTHONPATH=tests:tests/lab:tests/e2e $(BIN)/python tests/benchmarks/updates.py

bench-cold: controller ## the same from nothing, in fresh clones: half an hour
	@PYTHONPATH=tests python3 tests/benchmarks/commands.py --cold

bundle: controller ## all that a host without internet needs, from one that serves, into bundle/ (INVENTORY=inventory/production, LIMIT=HOST)
	@$(BIN)/ansible-playbook playbooks/bundle.yml $(if $(INVENTORY),-i $(INVENTORY)) $(if $(LIMIT),-l $(LIMIT))

docs: controller ## roles/README.md from the roles' argument specifications
	$(BIN)/python tests/role_tables.py

tables: controller ## docs/bad-input.md from the cases of the unit tests
	PYTHONPATH=server:tests/lab/hub $(BIN)/python tests/adapter_cases.py

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
