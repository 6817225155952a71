"""What a replica counts of its own work, for Prometheus. vLLM's figures stand in the same registry."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class ServerMetrics:
    """The counters, registered once with the registry that `/metrics` shows."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.recorded = Counter(
            "instructloop_completions_recorded", "Completions put on the queue", registry=registry
        )
        self.dropped = Counter(
            "instructloop_completions_dropped",
            "Completions that were served but not recorded",
            ["reason"],
            registry=registry,
        )
        self.waiting = Gauge(
            "instructloop_completions_waiting", "Completions in memory, not yet queued", registry=registry
        )
        self.spooled = Gauge(
            "instructloop_completions_spooled", "Completions on disk, not yet queued", registry=registry
        )
        self.feedback = Counter(
            "instructloop_feedback_accepted", "Events accepted", ["type"], registry=registry
        )
        self.refused = Counter(
            "instructloop_feedback_refused", "Events refused, by HTTP status", ["status"], registry=registry
        )
        self.limited = Counter(
            "instructloop_requests_limited", "Requests over a rate limit", ["limit"], registry=registry
        )
        self.routed = Counter(
            "instructloop_requests_routed",
            "Requests during a trial: whose arm's, and answered here, by a peer, or here for want of one",
            ["arm", "where"],
            registry=registry,
        )
        self.shadow_copies = Counter(
            "instructloop_shadow_copies", "Copies of requests for a shadow", ["outcome"], registry=registry
        )
        self.swaps = Counter(
            "instructloop_swaps", "Attempts to serve another version", ["outcome"], registry=registry
        )
        self.swap_seconds = Histogram(
            "instructloop_swap_seconds",
            "Time that generation stood still for a swap",
            registry=registry,
            buckets=(0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120),
        )
