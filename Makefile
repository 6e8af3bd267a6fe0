# Each target is what a person could type.
PYTHON ?= python3
URL ?= http://127.0.0.1:8080
RATE ?= 1000
BIN = .venv/bin
ROLES = $(filter-out default,$(sort $(patsubst molecule/%/molecule.yml,%,$(wildcard molecule/*/molecule.yml))))
export PATH := $(CURDIR)/.venv/bin:$(PATH)

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

up: control  ## make the local fleet, deploy to it, post a pixel and read it back
	$(PYTHON) fleet/fleet.py up

down:  ## remove the local fleet
	$(PYTHON) fleet/fleet.py down

test: lint check scenarios  ## all tests

lint: tools  ## style, types, and what Ansible's users expect
	ruff check .
	ruff format --check .
	mypy
	cd app && mypy
	mypy --config-file bench/pyproject.toml bench
	yamllint --strict .
	ansible-lint --profile production --offline
	.config/eslint/node_modules/.bin/eslint --config .config/eslint/eslint.config.js --max-warnings 0 app/src/pixel/live

check: tools  ## the tests that need no host
	pytest -q tests balancer
	cd app && env -u PIXEL_FLEET pytest -q
	cd bench && pytest -q

scenarios: tools  ## the roles and the fleet, on hosts that boot
	$(MAKE) --no-print-directory default
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target $(ROLES)

default $(ROLES): tools
	molecule test --scenario-name $@

bench: tools  ## compare ways to serve a durable pixel, on this machine
	PYTHONPATH="$(CURDIR)/app/src" $(BIN)/python -m bench.compare

load: tools  ## make load RATE=1000 SECONDS=60: a constant rate through the balancer
	$(BIN)/python -m bench.load --url $(URL) --rate $(RATE) --seconds $(or $(SECONDS),60) --writers 16 --strict

locust:  ## users who look, paint and watch, by Locust: http://127.0.0.1:8089
	$(PYTHON) fleet/bootstrap.py locust
	$(BIN)/locust --locustfile bench/load/locustfile.py --host $(URL) --web-host 127.0.0.1

report: control  ## drive the local fleet up to its knee, and draw what that took: 5 minutes
	$(PYTHON) fleet/bootstrap.py report
	$(BIN)/ansible-playbook playbooks/loadtest.yml

drill: tools  ## cause faults on the local fleet under load, and count what users notice
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

.PHONY: help up down test lint check scenarios default $(ROLES) bench load locust report drill docs release control tools
