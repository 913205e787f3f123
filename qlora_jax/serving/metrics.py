"""What the server counts, in the text format of Prometheus.

A registry of its own for each server, so that two of them in one process (tests) do not add up.
Names, units and buckets follow Prometheus' conventions: base units, `_total` on counters.
"""

import prometheus_client as prometheus

from qlora_jax.serving.scheduler import Scheduler

CONTENT_TYPE = prometheus.CONTENT_TYPE_PLAIN_0_0_4
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_REPLY_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server.

    Attributes:
        responses: answers by path and status.
        refused: requests that were not taken, by code of the error.
        finished: replies by model and finish reason.
        prompt_tokens: tokens of prompts, by model.
        completion_tokens: tokens generated, by model.
        first_token: seconds from a request to the first text of its reply.
        reply: seconds from a request to the end of its reply.
        votes: verdicts of the game.
    """

    def __init__(self, scheduler: Scheduler):
        """Begins at zero.

        Args:
            scheduler: asked for what runs and waits whenever the metrics are read.
        """
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        prometheus.GCCollector(registry=self.registry)
        make = {"namespace": "qlora_jax", "registry": self.registry}
        self.responses = prometheus.Counter("responses", "Answers", ["path", "status"], **make)
        self.refused = prometheus.Counter("refused", "Requests not taken", ["code"], **make)
        self.finished = prometheus.Counter(
            "replies", "Replies that ended", ["model", "finish_reason"], **make
        )
        self.prompt_tokens = prometheus.Counter("prompt_tokens", "In prompts", ["model"], **make)
        self.completion_tokens = prometheus.Counter(
            "completion_tokens", "Generated", ["model"], **make
        )
        self.first_token = prometheus.Histogram(
            "first_token_seconds", "To the first text", buckets=_FIRST_TOKEN_S, **make
        )
        self.reply = prometheus.Histogram(
            "reply_seconds", "To the end of a reply", buckets=_REPLY_S, **make
        )
        self.votes = prometheus.Counter("votes", "Verdicts of the game", **make)
        running = prometheus.Gauge("replies_running", "Replies that have a slot", **make)
        running.set_function(lambda: scheduler.running)
        waiting = prometheus.Gauge("replies_waiting", "Replies that wait for a slot", **make)
        waiting.set_function(lambda: scheduler.waiting)

    def text(self) -> bytes:
        """All metrics now."""
        return prometheus.generate_latest(self.registry)
