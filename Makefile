# `make check` looks at format and lint; `make test` runs the whole test suite.
.PHONY: check test format

check:
	scripts/check.sh

test:
	scripts/test.sh

format:
	scripts/setup.sh test
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
