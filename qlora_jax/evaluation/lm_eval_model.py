"""Our models in lm-evaluation-harness, whose tasks the open leaderboards use.

    import lm_eval
    from qlora_jax.evaluation.lm_eval_model import LmEvalModel

    model, tokenizer = load_trained("runs/quickstart")
    lm_eval.simple_evaluate(LmEvalModel(model, tokenizer), tasks=["arc_easy"], num_fewshot=0)

Needs the extra `lm_eval` (`pip install "qlora-jax[lm_eval]"`). Scores are computed by
`evaluation.scoring`, replies by the engine that serves chats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from qlora_jax.data.tokenizer import Tokenizer
from qlora_jax.errors import ConfigError
from qlora_jax.evaluation.perplexity import windows
from qlora_jax.evaluation.replies import replies
from qlora_jax.evaluation.scoring import Scorer
from qlora_jax.generation.engine import Engine, Request
from qlora_jax.sampling import Sampling

_DEFAULT_REPLY = 256


@register_model("qlora_jax")
class LmEvalModel(TemplateLM):
    """A decoder as lm-eval wants it.

    Args:
        model: a decoder, adapters or not.
        tokenizer: the model's.
        max_len: tokens that the model is given at most, see `Scorer`.
        batch_tokens: tokens of a batch that is scored.
        slots: replies that are generated at a time.

    Raises:
        ConfigError: see `Scorer`; or the tokenizer has no end token.
    """

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer,
        *,
        max_len: int | None = None,
        batch_tokens: int = 4096,
        slots: int = 8,
    ):
        super().__init__()
        if not tokenizer.eos_token_ids:
            raise ConfigError("lm-eval needs a tokenizer with an end token")
        self._model, self._tokenizer, self._slots = model, tokenizer, slots
        self._scorer = Scorer(model, max_len=max_len, batch_tokens=batch_tokens)
        self._engine: Engine | None = None  # until something is generated

    @property
    def eot_token_id(self) -> int:
        """The end token; also what an empty context stands for."""
        return self._tokenizer.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """BOS, or the end token where there is none."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that the model is given at most."""
        return self._scorer.max_len

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keys its cache of chats with."""
        return self._tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with BOS in front if the model was trained with it."""
        ids, bos = self._tokenizer.encode(string), self._tokenizer.bos_token_id
        adds = self._tokenizer.add_bos_token if add_special_tokens is None else add_special_tokens
        return [bos, *ids] if adds and bos is not None and ids[:1] != [bos] else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the model's chat template."""
        return self._tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        # As lm-eval does with its other models: the beginning of what is too long is cut off.
        room = self._scorer.max_len + 1
        rows = [((*context, *answer)[-room:], len(answer)) for _, context, answer in requests]
        pairs = [(row[: max(1, len(row) - n)], row[max(1, len(row) - n) :]) for row, n in rows]
        return [(one.total, one.is_greedy) for one in self._scorer.log_likelihoods(pairs)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, in windows that do not overlap."""
        size = self._scorer.max_len
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = windows([self.prefix_token_id, *ids], size, size)
            totals.append(sum(one.total for one in self._scorer.log_likelihoods(parts)))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies to prompts, each with its own settings."""
        if self._engine is None:
            self._engine = Engine(self._model, self._tokenizer, slots=self._slots)
        asked = [self._request(*request.args) for request in requests]
        texts = [""] * len(asked)
        for i, reply in replies(self._engine, asked):
            texts[i] = reply.text
        return texts

    def _request(self, context: str, settings: dict[str, Any]) -> Request:
        until = settings.get("until") or []
        new = settings.get("max_gen_toks", settings.get("max_new_tokens", _DEFAULT_REPLY))
        samples = settings.get("do_sample", True)
        temperature = settings.get("temperature", 0.0) if samples else 0.0
        sampling = Sampling(temperature, settings.get("top_k", 0), settings.get("top_p", 1.0))
        return Request(
            prompt_ids=self.tok_encode(context)[-(self._engine.max_len - new) :],
            max_new_tokens=new,
            sampling=sampling,
            seed=settings.get("seed", 0),
            stop=[until] if isinstance(until, str) else until,
        )
