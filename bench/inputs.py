"""Tests with valid, unusual, and damaged inputs: nothing may fail silently.

    make bench NAME=inputs
    python -m bench.inputs --seed 1 --count 30

Seeded generators make data files, labeled tables, prompts, model folders, GGUF files, and recipes.
Each generator knows the expected result independently of the code under test. A trial that takes
too long is stopped. Every failure is listed with the numbers that reproduce it:

    python -m bench.inputs --seed 1 --only data:17
"""

from __future__ import annotations

from bench.input_trials.trial import MEANING
from bench.input_trials.workers import Family
from bench.trial_command import TrialBench, run_command

FAMILIES = {
    family.name: family
    for family in (
        Family("data", "bench.input_trials.data_trials", 20.0),
        Family("tables", "bench.input_trials.table_trials", 20.0),
        Family("models", "bench.input_trials.model_trials", 30.0),
        Family("gguf", "bench.input_trials.gguf_trials", 30.0),
        Family("recipes", "bench.input_trials.recipe_trials", 2.0),
    )
}
COUNTS = {"data": 240, "tables": 60, "models": 240, "gguf": 60, "recipes": 2000}


def main() -> None:
    run_command(TrialBench("inputs", FAMILIES, COUNTS, MEANING), __doc__)


if __name__ == "__main__":
    main()
