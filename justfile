set shell := ["bash", "-euo", "pipefail", "-c"]

# list the recipes
default:
    @just --list

# format and fix what can be fixed
fmt:
    ruff format .
    ruff check --fix .

# everything CI runs beside the tests and the demo
lint:
    ruff format --check .
    ruff check .
    lint-imports
    mypy

# pass arguments through: just test -k store
test *ARGS:
    pytest {{ARGS}}

# what `just test` leaves out: minutes of real kills, the whole demo, a longer fuzz
test-slow *ARGS:
    pytest -m slow --dist loadfile {{ARGS}}

# lint and tests
check: lint test test-slow

# the whole chain on the embedded model
demo *ARGS:
    bsc demo {{ARGS}}

# the documentation as a site, in site/: no dead link, every public name with its signature
docs *ARGS:
    NO_MKDOCS_2_WARNING=1 mkdocs build --strict {{ARGS}}

# one benchmark: just bench step_size
bench NAME *ARGS:
    python -m benchmarks.bench_{{NAME}} {{ARGS}}

# is it right on this GPU, how fast, and why: nine minutes; findings as JSON lines
gpu OUT="gpu.jsonl" *ARGS:
    python benchmarks/bench_gpu.py --out {{OUT}} {{ARGS}}

# a benchmark here and at another commit, in turn: just compare b7aff8b bench_train.py --parts step
compare COMMIT *ARGS:
    python benchmarks/compare.py {{COMMIT}} -- {{ARGS}}

# train the embedded model again (an hour on two cores); writes bsc/embedded/model
demo-model *ARGS:
    python -m bsc.embedded.recipe {{ARGS}}

# pin what this environment has installed
pin:
    pip freeze --exclude-editable | sed 's/+cpu//' | grep -v '^bsc' > constraints.txt
