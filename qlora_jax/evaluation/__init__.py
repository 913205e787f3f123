"""Is a model good? Scores of a language model, judges' verdicts, and tournaments from them.

`scoring` asks a model for probabilities; `mmlu`, `crows_pairs` and `perplexity` are made of them,
`suites` runs them whole, `lm_eval_model` brings the tasks of lm-eval. `datatypes` says what it
costs to round weights, `datatypes_model` what it costs a model. `questions` reads chat benchmarks,
`chat_answers` has a model answer them, `judges` asks a judge about `comparisons` (in the words of
`judge_prompts`, through `judge_client`). `judging` reads the text that a judge wrote, `ratings` the
files that hold verdicts, `elo` turns them into ratings of systems, `elo_report` into a page;
`agreement` measures how far raters agree.
"""

from qlora_jax.evaluation.agreement import compare_raters as compare_raters
from qlora_jax.evaluation.agreement import fleiss_kappa as fleiss_kappa
from qlora_jax.evaluation.elo import BradleyTerry as BradleyTerry
from qlora_jax.evaluation.elo import Elo as Elo
from qlora_jax.evaluation.elo import bradley_terry as bradley_terry
from qlora_jax.evaluation.elo import elo_ratings as elo_ratings
from qlora_jax.evaluation.judging import parse_relative as parse_relative
from qlora_jax.evaluation.judging import parse_threeclass as parse_threeclass
from qlora_jax.evaluation.ratings import Ratings as Ratings
from qlora_jax.evaluation.ratings import read_ratings as read_ratings
from qlora_jax.evaluation.scoring import LogLikelihood as LogLikelihood
from qlora_jax.evaluation.scoring import Scorer as Scorer
