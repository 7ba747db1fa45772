# `make check` looks at format and lint; `make test` runs the tests, and
# `make test-long` the long ones, which the tests leave out.
.PHONY: check test test-long format

check:
	scripts/check.sh

test:
	scripts/test.sh

test-long:
	scripts/test_long.sh

format:
	scripts/setup.sh test
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
