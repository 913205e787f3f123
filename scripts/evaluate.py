"""Evaluates; so far, one suite: a tournament of systems from judges' verdicts.

    python scripts/evaluate.py --suite=elo --ratings=ratings/ --out=report
    python scripts/evaluate.py --suite=elo --ratings=ratings/ --out=report --matches=493

--ratings is a file or a folder of JSON Lines: records of the QLoRA authors, or with model_a,
model_b and winner (qlora_jax/evaluation/ratings.py says more). The folder --out gets report.md,
report.html, elo.json and the plots. No model is loaded and no GPU is used.
"""

from absl import flags

from qlora_jax import command_line
from qlora_jax.evaluation import elo_report, read_ratings

flags.DEFINE_enum("suite", None, ["elo"], "what to evaluate", required=True)
_RATINGS = flags.DEFINE_string("ratings", None, "a file or folder of verdicts", required=True)
_OUT = flags.DEFINE_string("out", None, "the folder that gets the report", required=True)
_ORDERINGS = flags.DEFINE_integer("orderings", 10_000, "random orderings of Elo", lower_bound=2)
_MATCHES = flags.DEFINE_integer("matches", None, "drawn by each ordering (all)", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the orderings and the bootstrap", lower_bound=0)


def main() -> None:
    """Reads the verdicts and writes the report."""
    report = elo_report.write(
        read_ratings(_RATINGS.value),
        _OUT.value,
        orderings=_ORDERINGS.value,
        matches=_MATCHES.value,
        seed=_SEED.value,
        source=_RATINGS.value,
    )
    print(f"wrote {report}")


if __name__ == "__main__":
    command_line.run(main)
