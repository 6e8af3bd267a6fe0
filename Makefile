# Targets that users type; `make help` lists those with a description.
PYTHON ?= python3
URL ?= http://127.0.0.1:8080
RATE ?= 1000
BIN = .venv/bin
CHECKS = check-repository check-app check-bench
# Two tests at a time. Those with the mark `timing` wait for timeouts of real servers: they need the processors
# at once but rarely, so they follow, four at a time.
BUSY = -n 2 --dist worksteal -m "not timing"
WAITING = -n 4 --dist worksteal -m timing
SCENARIOS = $(sort $(patsubst molecule/%/molecule.yml,%,$(wildcard molecule/*/molecule.yml)))
# Faults and commands under load have limits that need the processors.
ALONE = ha operations
BESIDE = --no-print-directory --output-sync=target --jobs
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Ansible ignores ansible.cfg in a world-writable directory unless this variable names it.
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

up: control  ## create the local fleet, deploy to it, post a pixel and read it back; FLEET=ha: three hosts
	$(PYTHON) fleet/fleet.py up $(FLEET)

down:  ## remove the local fleet
	$(PYTHON) fleet/fleet.py down

test: tools  ## all tests
	$(MAKE) $(BESIDE) 2 lint images
	$(MAKE) check
	$(MAKE) scenarios

lint: tools  ## style, types, and Ansible's production profile
	ruff check .
	ruff format --check .
	mypy
	cd app && mypy
	mypy --config-file bench/pyproject.toml bench
	yamllint --strict .
	ansible-lint --profile production --offline
	.config/eslint/node_modules/.bin/eslint --config .config/eslint/eslint.config.js --max-warnings 0 app/src/pixel/live

check: check-repository  ## the tests that need no host
	$(MAKE) $(BESIDE) 2 $(filter-out $<,$(CHECKS))

check-repository: tools
	pytest -q $(BUSY) tests balancer
	pytest -q $(WAITING) tests balancer

check-app: tools
	cd app && env -u PIXEL_FLEET pytest -q $(BUSY)
	cd app && env -u PIXEL_FLEET pytest -q $(WAITING)

check-bench: tools
	cd bench && pytest -q $(BUSY)
	cd bench && pytest -q $(WAITING)

scenarios: tools  ## tests of the roles and the fleet, on hosts with systemd
	$(MAKE) $(ALONE)
	$(MAKE) $(BESIDE) 3 $(filter-out $(ALONE),$(SCENARIOS))

$(SCENARIOS): tools
	molecule test --scenario-name $@

images: tools
	$(PYTHON) fleet/fleet.py images bookworm trixie

bench: tools  ## compare ways to serve a durable pixel, on this machine
	PYTHONPATH="$(CURDIR)/app/src" $(BIN)/python -m bench.compare

load: tools  ## make load RATE=1000 SECONDS=60: a constant rate through the balancer
	$(BIN)/python -m bench.load --url $(URL) --rate $(RATE) --seconds $(or $(SECONDS),60) --writers 16 --strict

locust:  ## simulate users with Locust: http://127.0.0.1:8089
	$(PYTHON) fleet/bootstrap.py locust
	$(BIN)/locust --locustfile bench/load/locustfile.py --host $(URL) --web-host 127.0.0.1

report: control  ## load the local fleet up to its knee and draw a report: 5 minutes
	$(PYTHON) fleet/bootstrap.py report
	$(BIN)/ansible-playbook playbooks/loadtest.yml

drill: tools  ## cause faults on the local fleet under load and count failed requests
	$(BIN)/python -m bench.drill

docs: tools  ## write the roles' READMEs from their argument specs, and the API's answers
	for role in roles/*; do aar-doc --output-file README.md $$role markdown; done
	cd app && PYTHONPATH=src python tests/test_docs.py

release:  ## make release VERSION=1.1.0: date the changelog, set the version, commit, tag; nothing is pushed
	$(PYTHON) .ci/release.py $(VERSION)

control:
	@$(PYTHON) fleet/bootstrap.py control

tools:
	@$(PYTHON) fleet/bootstrap.py test

.PHONY: help up down test lint check $(CHECKS) scenarios $(SCENARIOS) images bench load locust report drill docs release control tools
