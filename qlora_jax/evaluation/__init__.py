"""Is a chat model good? Judges' verdicts, and tournaments of systems from them.

`judging` reads the text that a judge wrote, `ratings` the files that hold verdicts, `elo` turns
them into ratings of systems, `elo_report` into a page. Only NumPy and matplotlib are needed.
"""

from qlora_jax.evaluation.elo import BradleyTerry as BradleyTerry
from qlora_jax.evaluation.elo import Elo as Elo
from qlora_jax.evaluation.elo import bradley_terry as bradley_terry
from qlora_jax.evaluation.elo import elo_ratings as elo_ratings
from qlora_jax.evaluation.judging import parse_relative as parse_relative
from qlora_jax.evaluation.judging import parse_threeclass as parse_threeclass
from qlora_jax.evaluation.ratings import Ratings as Ratings
from qlora_jax.evaluation.ratings import read_ratings as read_ratings
