# `make up` runs the system, `make test` checks it. Each sets up what it needs; the second time is quick.
# Elsewhere than on a machine whose pip finds torch==…+cpu: make up TORCH_INDEX=<URL of PyTorch's CPU wheels>

.PHONY: up test fuzz fuzz-store lint bench bench-rm bench-ppo bench-quality bench-faults bench-feedback bench-poison bench-canary bench-tax bench-judges bench-swap bench-serving format defaults lock clean
export TORCH_INDEX PYTHON

PACKAGES := instructloop feedback registry evaluation training server
RUN := .venv/bin/python -m

# exec: Ctrl-C reaches `up` alone, which stops what it started.
up: .venv/.installed
	@exec $(RUN) instructloop.cli up

.venv/.installed: requirements.lock pyproject.toml docker/install.sh
	@docker/install.sh

lint: .venv/.installed
	@echo '==> ruff'
	@$(RUN) ruff check $(PACKAGES) tests docker
	@$(RUN) ruff format --check $(PACKAGES) tests docker
	@echo '==> mypy'
	@$(RUN) mypy

test: lint
	@echo '==> unit tests'
	@$(RUN) pytest -n 2 --dist worksteal tests/unit
	@echo '==> integration tests: tiny models fitted, the real engine, Redis and database'
	@$(RUN) pytest -v -n 2 --dist loadfile -m 'not engine' tests/integration
	@$(RUN) pytest -v -m engine tests/integration
	@echo '==> end-to-end tests: a real `instructloop up`'
	@$(RUN) pytest -v tests/e2e

# As in the integration tests, with more examples of each operation for each kind of caller.
FUZZ_EXAMPLES ?= 300
fuzz: .venv/.installed
	@echo '==> schemathesis on our OpenAPI document, $(FUZZ_EXAMPLES) examples of each operation'
	@INSTRUCTLOOP_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(RUN) pytest -v tests/integration/test_server_fuzz.py

# Figures, not tests: about three quarters of an hour on two cores, a quarter with SETS=hh.
SETS ?= hh qa llmbar hhh curve
bench: .venv/.installed
	@echo '==> reward models on $(SETS) (INSTRUCTLOOP_DATA, by default ../shared/data)'
	@$(RUN) tests.benchmarks.reward_models $(SETS)

bench-rm: .venv/.installed
	@echo '==> an epoch of the reward model against TRL (INSTRUCTLOOP_DATA, by default ../shared/data)'
	@$(RUN) tests.benchmarks.reward_model_against_trl

# About twenty minutes on two cores.
bench-ppo: .venv/.installed
	@echo '==> one PPO update beside stock TRL'
	@$(RUN) tests.benchmarks.ppo_against_trl

# About an hour on two cores.
bench-quality: .venv/.installed
	@echo '==> what PPO gains by a gold preference, over three seeds'
	@$(RUN) tests.benchmarks.ppo_quality

# Some minutes on two cores.
bench-faults: .venv/.installed
	@echo '==> feedback while every part fails in turn'
	@$(RUN) tests.benchmarks.faults

# Some minutes on two cores.
bench-feedback: .venv/.installed
	@echo '==> giving and storing feedback beside bare loops'
	@$(RUN) tests.benchmarks.feedback_throughput

# About a quarter of an hour on two cores, most of it until the trunk has seen the texts.
bench-poison: .venv/.installed
	@echo '==> poisoned votes with the defences off and on (INSTRUCTLOOP_DATA, by default ../shared/data)'
	@$(RUN) tests.benchmarks.poison

bench-canary: .venv/.installed
	@echo '==> how often the canary rule errs while it looks after every vote, and how many votes it takes'
	@$(RUN) tests.benchmarks.canary_errors

bench-tax: .venv/.installed
	@echo '==> HellaSwag and PIQA of the default model (INSTRUCTLOOP_DATA, by default ../shared/data)'
	@$(RUN) tests.benchmarks.tax

# A language model instead: JUDGE="--url http://…/v1 --model NAME"
JUDGE ?=
bench-judges: .venv/.installed
	@echo '==> how often judges agree with people (INSTRUCTLOOP_DATA, by default ../shared/data)'
	@$(RUN) tests.benchmarks.judges $(JUDGE)

# Nothing else may run meanwhile.
bench-swap: .venv/.installed
	@echo '==> ten swaps under load, beside a bare reload of weights'
	@$(RUN) tests.benchmarks.swaps

# Nothing else may run meanwhile.
bench-serving: .venv/.installed
	@echo '==> serving with everything on, beside a bare `vllm serve`'
	@$(RUN) tests.benchmarks.serving

# More and longer cases than the test has, each run other ones: about a quarter of an hour on two cores.
fuzz-store: .venv/.installed
	@echo '==> the queue and the store against a slow model'
	@$(RUN) pytest -q tests/integration/test_feedback_machine.py --hypothesis-profile=fuzz

format: .venv/.installed
	@$(RUN) ruff check --fix $(PACKAGES) tests docker
	@$(RUN) ruff format $(PACKAGES) tests docker

# After a change of settings: write their defaults and descriptions to the shipped file.
defaults: .venv/.installed
	@.venv/bin/python -c 'from instructloop.config import defaults_toml as text; print(text(), end="")' > instructloop/defaults.toml.new
	@mv instructloop/defaults.toml.new instructloop/defaults.toml

# After an upgrade in .venv: pin what is installed.
lock:
	@.venv/bin/python docker/lock.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
