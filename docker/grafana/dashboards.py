"""Writes Grafana's dashboards from the tables below: `python docker/grafana/dashboards.py`.

JSON is what Grafana reads, this is what people read. In a query `@` stands for the chosen instances.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "dashboards"
_RULES = (Path(__file__).parents[1] / "prometheus" / "rules.yaml").read_text(encoding="utf-8")
_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 2
_LISTS = "suffix: lists/s"  # Grafana has no unit of that name, but suffixes
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Panel(NamedTuple):
    """Is one graph: queries of Prometheus, each with the legend of its lines."""

    title: str
    unit: str  # as Grafana names it
    queries: tuple[tuple[str, str], ...]
    text: str = ""  # what to make of it
    is_stacked: bool = False
    alert: str = ""  # whose limit is drawn


# Steps are models of their own, <release>_<step>; pipelines are <release>_recommend, routers route_<number>.
_STEP = 'model=~"[^_]+_.+", model!~"route_.*|.*_recommend|.*_search"'
_PIPELINES = 'model=~"recommend|search"'
_CALLERS_OWN = re.findall(r'flag!~"(.+?)"', _RULES)[0]  # what DegradedLists leaves out
_OURS, _CALLERS = f'flag!~"{_CALLERS_OWN}"', f'flag=~"{_CALLERS_OWN}"'
_WORKERS = '@, model!~"route_.*"'  # a router's process answers several at once
_USED = '@, tier="snapshot"'  # old rows that an answer was made of: those of memory are asked for again first


def _by_step(expression: str) -> str:
    """Sums a rate of Triton's models by step, whatever the release."""
    named = f'label_replace({expression}, "step", "$1", "model", "[^_]+_(.+)")'
    return f"sum by (step) ({named})"


def _rate(name: str, labels: str = "@") -> str:
    """Gives a counter's growth a second."""
    return f"rate({name}{{{labels}}}[$__rate_interval])"


def _those_above_0(expression: str, label: str, there: str = "") -> str:
    """Leaves out series of 0, whose names would fill the legend; where all are, one is called "none"."""
    none = f'label_replace(0 * sum({there or expression}), "{label}", "none", "", "")'
    return f"({expression}) > 0 or {none}"


def thresholds(alert: str) -> dict[str, Any]:
    """Gives the limit of an alert of ../prometheus/rules.yaml for Grafana, red where it rings."""
    rule = re.search(rf"alert: {alert}\b.*?([<>]) ([\d.]+)\n\s+for:", _RULES, re.DOTALL)
    assert rule, f"no limit of {alert} in rules.yaml"
    below, above = ("green", "red") if rule[1] == ">" else ("red", "green")
    steps = [{"color": below, "value": None}, {"color": above, "value": float(rule[2])}]
    return {"mode": "absolute", "steps": steps}


def _a_request(expression: str) -> str:
    """Divides by the requests a second."""
    return f"{expression} / scalar(sum({_rate('nv_inference_request_success', '@, ' + _PIPELINES)}))"


CHAIN = (
    Panel(
        "Alerts that ring",
        "short",
        (
            (
                "sum by (alertname, alertstate) (ALERTS{@}) or "
                'label_replace(vector(0), "alertname", "none", "", "")',
                "{{alertstate}} {{alertname}}",
            ),
        ),
        "On how many instances; pending ones are about to. docker/RUNBOOK.md has each by its name.",
        is_stacked=True,
    ),
    Panel(
        "Requests answered",
        "reqps",
        ((f"sum by (model) ({_rate('nv_inference_request_success', '@, ' + _PIPELINES)})", "{{model}}"),),
    ),
    Panel(
        "Latency on the server",
        "µs",
        (
            (
                f"max by (model, quantile) (nv_inference_request_summary_us{{@, {_PIPELINES}}})",
                "{{model}} q{{quantile}}",
            ),
        ),
        "The slowest instance's.",
        alert="SlowLists",
    ),
    Panel(
        "Slowest of a hundred lists, by instance",
        "µs",
        (
            (
                'max by (instance) (nv_inference_request_summary_us{@, model="recommend", quantile="0.99"})',
                "{{instance}}",
            ),
        ),
        "One that is slower than the others: its node, or its share of the requests (capacity).",
        alert="SlowLists",
    ),
    Panel(
        "What a request costs, by step",
        "µs",
        ((_a_request(_by_step(_rate("nv_inference_request_duration_us", "@, " + _STEP))), "{{step}}"),),
        "Queue and work of each step, over the requests a second.",
        is_stacked=True,
    ),
    Panel(
        "What a request costs, by step (--fused)",
        "s",
        ((_a_request(f"sum by (step) ({_rate('peregrine_step_seconds')})"), "{{step}}"),),
        "Where all steps run in one process; while a canary lasts, the router's steps.",
        is_stacked=True,
    ),
    Panel(
        "Waiting in queues, by step",
        "µs",
        (
            (_a_request(_by_step(_rate("nv_inference_queue_duration_us", "@, " + _STEP))), "{{step}}"),
            (
                _a_request(
                    "sum("
                    + _rate("nv_inference_queue_duration_us", '@, model=~"[^_]+_(recommend|search)"')
                    + ")"
                ),
                "whole pipelines (--fused)",
            ),
        ),
        "QueueGrows rings for the sum of all; pods are added at 5 ms.",
        alert="QueueGrows",
    ),
    Panel(
        "Users a batch, by step",
        "short",
        (
            (
                _by_step(_rate("nv_inference_count", "@, " + _STEP))
                + " / "
                + _by_step(_rate("nv_inference_exec_count", "@, " + _STEP)),
                "{{step}}",
            ),
        ),
    ),
    Panel(
        "Requests that failed, by instance",
        "percentunit",
        (
            (
                f"sum by (instance) ({_rate('nv_inference_request_failure', '@, ' + _PIPELINES)})"
                f" / sum by (instance) ({_rate('nv_inference_count', '@, ' + _PIPELINES)})",
                "{{instance}}",
            ),
        ),
        alert="FailedRequests",
    ),
    Panel(
        "Requests that failed, by reason",
        "reqps",
        (
            (
                _those_above_0(
                    f"sum by (reason) ({_rate('nv_inference_request_failure', '@, ' + _PIPELINES)})", "reason"
                ),
                "{{reason}}",
            ),
        ),
        "OTHER: a step said no, as when no time is left. REJECTED: a queue did. BACKEND: a step failed.",
    ),
    Panel(
        "Lists that lack something",
        "percentunit",
        (
            (
                _those_above_0(
                    f"sum by (flag) ({_rate('peregrine_lists_degraded', '@, ' + _OURS)})"
                    f" / scalar(sum({_rate('peregrine_lists')}))",
                    "flag",
                ),
                "{{flag}}",
            ),
        ),
        "Share of the lists with each flag of `degraded` (README) that is no caller's own.",
        alert="DegradedLists",
    ),
    Panel(
        "Lists for strangers, or of what nobody knows",
        "percentunit",
        (
            (
                _those_above_0(
                    f"sum by (flag) ({_rate('peregrine_lists_degraded', '@, ' + _CALLERS)})"
                    f" / scalar(sum({_rate('peregrine_lists')}))",
                    "flag",
                ),
                "{{flag}}",
            ),
        ),
        "A sudden rise: users or items that no release has, or a caller that sends other ids. Probes count.",
    ),
)
TIERS = (
    Panel(
        "Rows found, by tier",
        "rowsps",
        ((f"sum by (tier) ({_rate('peregrine_tier_hits')})", "{{tier}}"),),
        is_stacked=True,
    ),
    Panel(
        "Share of what a tier was asked for that it had",
        "percentunit",
        (
            (
                f"sum by (tier) ({_rate('peregrine_tier_hits')}) / (sum by (tier) "
                f"({_rate('peregrine_tier_hits')}) + sum by (tier) ({_rate('peregrine_tier_misses')}))",
                "{{tier}}",
            ),
        ),
    ),
    Panel(
        "Redis: time of a call",
        "µs",
        tuple(
            (
                f"histogram_quantile({q}, sum by (le) ({_rate('peregrine_tier_latency_us_bucket')}))",
                f"q{q}",
            )
            for q in (0.5, 0.99)
        ),
        "It has 5 ms; what it says later is kept for the next request. 10 ms: or longer.",
    ),
    Panel(
        "Redis: failures by cause",
        "ops",
        (
            (
                _those_above_0(
                    f"sum by (cause) ({_rate('peregrine_tier_failures')})",
                    "cause",
                    _rate("peregrine_tier_read_bytes"),  # there before anything has failed
                ),
                "{{cause}}",
            ),
        ),
    ),
    Panel(
        "Redis: processes without it",
        "short",
        (
            ("sum(1 - peregrine_tier_breaker_closed{@})", "left alone"),
            ("sum(1 - peregrine_tier_tracking{@})", "not tracking"),
        ),
        "After failures a process leaves it alone for a while; without tracking it hears of no change.",
    ),
    Panel(
        "Old rows that were used, by instance",
        "rowsps",
        ((f"sum by (instance) ({_rate('peregrine_tier_stale', _USED)})", "{{instance}}"),),
        "Past their time to live, and Redis did not say what has changed.",
        alert="StaleFeatures",
    ),
    Panel(
        "Memory of rows",
        "bytes",
        (
            ("sum by (table) (peregrine_tier_memory_bytes{@})", "{{table}}"),
            ("sum by (table) (peregrine_tier_memory_max_bytes{@})", "{{table}}: may have"),
        ),
    ),
    Panel(
        "Rows that memory dropped",
        "rowsps",
        (
            (f"sum({_rate('peregrine_tier_evictions')})", "no room"),
            (f"sum({_rate('peregrine_tier_invalidations')})", "changed in Redis"),
        ),
    ),
)
INDEX = (
    Panel(
        "Recall of the index",
        "percentunit",
        (("min by (instance) (peregrine_recall_at_n{@})", "{{instance}}"),),
        "What of an exact search's items it finds.",
        alert="RecallLost",
    ),
    Panel(
        "Searches that were compared",
        "short",
        (
            ("sum by (instance) (peregrine_recall_probed{@})", "{{instance}}"),
            ("sum by (instance) (peregrine_recall_dropped{@})", "{{instance}} dropped"),
            ("sum by (instance) (peregrine_recall_failed{@})", "{{instance}} failed"),
        ),
    ),
    Panel(
        "How unlike the build's users' vectors are",
        "short",
        (
            ("max(peregrine_query_mean_shift{@})", "mean, in deviations"),
            ("max(peregrine_query_occupancy_shift{@})", "clusters"),
            ("max(peregrine_query_score_shift{@})", "best score"),
        ),
        "0: the same.",
    ),
    Panel(
        "Changes of items",
        "short",
        (
            ("max(peregrine_catalogue_sequence{@})", "made"),
            ("min by (instance) (peregrine_served_sequence{@})", "{{instance}} serves"),
        ),
        "ItemsBehind rings where they differ for a minute.",
    ),
    Panel(
        "Items beside the main index",
        "short",
        (
            ("max by (instance) (peregrine_live_delta_items{@})", "{{instance}}"),
            ("max by (instance) (peregrine_live_segments{@})", "{{instance}} segments"),
        ),
        "A merge makes them few again.",
    ),
    Panel(
        "Processes that cannot follow the items",
        "short",
        (("sum by (instance) (peregrine_live_fault{@})", "{{instance}}"),),
    ),
)
ROUTE = (
    Panel(
        "Share of users",
        "percentunit",
        (
            (
                "sum by (release) (peregrine_route_share{@}) / scalar(sum(peregrine_route_share{@}))",
                "{{release}}",
            ),
        ),
        is_stacked=True,
    ),
    Panel(
        "Lists, by release",
        _LISTS,
        (
            (
                "sum by (release) (label_replace("
                + _rate("nv_inference_count", '@, model=~"[^_]+_recommend"')
                + ', "release", "$1", "model", "([^_]+)_recommend"))',
                "{{release}}",
            ),
            (f"sum by (release) ({_rate('peregrine_route_lists')})", "{{release}} by the router"),
        ),
    ),
    Panel(
        "Late, failed, empty, by release",
        _LISTS,
        tuple(
            (f"sum by (release) ({_rate(f'peregrine_route_{what}')})", f"{{{{release}}}} {what}")
            for what in ("late", "failed", "empty")
        ),
        "While a canary lasts: `peregrine release status` says what becomes of it.",
    ),
    Panel(
        "Lists that lack something, by release",
        "percentunit",
        (
            (
                f"sum by (release) ({_rate('peregrine_route_degraded')}) / "
                f"sum by (release) ({_rate('peregrine_route_lists')})",
                "{{release}}",
            ),
        ),
        "Strangers count.",
    ),
    Panel(
        "Age of releases",
        "s",
        (("max by (release) (peregrine_release_age_seconds{@})", "{{release}}"),),
    ),
    Panel(
        "Held-out figures of the chain",
        "short",
        (
            (
                'max by (release, figure) (peregrine_release_figure{@, figure!~".*.(5|20)"})',
                "{{release}} {{figure}}",
            ),
        ),
        "As the build measured them.",
    ),
    Panel(
        "Serves another release than the route says",
        "short",
        (("max by (instance) (peregrine_route_behind{@})", "{{instance}}"),),
    ),
    Panel(
        "Since the store was read",
        "s",
        (("max by (instance) (peregrine_store_age_seconds{@})", "{{instance}}"),),
        "Where `peregrine pull --follow` runs.",
    ),
)
CAPACITY = (
    Panel(
        "Gives lists",
        "short",
        (
            (
                'min by (instance) (peregrine_ready{@} or up{job=~"peregrine|serve", @} == 0)',
                "{{instance}}",
            ),
        ),
        "0: it starts, drains or gives none (`/readyz` says why), or is gone.",
    ),
    Panel(
        "Requests answered, by instance",
        "reqps",
        (
            (
                f"sum by (instance) ({_rate('nv_inference_request_success', '@, ' + _PIPELINES)})",
                "{{instance}}",
            ),
        ),
    ),
    Panel(
        "Probes: time of a list",
        "s",
        (("max by (instance) (peregrine_probe_seconds{@})", "{{instance}}"),),
    ),
    Panel(
        "Share of their time that a model's processes work",
        "percentunit",
        (
            (
                f"sum by (instance, model) ({_rate('nv_inference_compute_infer_duration_us', _WORKERS)}"
                f" * {_rate('nv_inference_exec_count', _WORKERS)}"
                f" / {_rate('nv_inference_request_success', _WORKERS)}) / 1e6"
                " / on (instance, model) peregrine_stubs{@}",
                "{{instance}} {{model}}",
            ),
        ),
        "Near 100% requests begin to wait: `serve --instances`, or another node.",
    ),
    Panel(
        "Requests that wait for a process",
        "short",
        (("sum by (instance) (nv_inference_pending_request_count{@})", "{{instance}}"),),
        "Of all steps: a pipeline has no queue of its own.",
    ),
    Panel("CPU of the node", "percentunit", (("max by (instance) (nv_cpu_utilization{@})", "{{instance}}"),)),
    Panel(
        "Memory of the node",
        "bytes",
        (
            ("max by (instance) (nv_cpu_memory_used_bytes{@})", "{{instance}}"),
            ("max by (instance) (nv_cpu_memory_total_bytes{@})", "{{instance}} has"),
        ),
    ),
    Panel(
        "Python processes",
        "short",
        (
            ("sum by (instance) (peregrine_stubs{@})", "{{instance}}"),
            ("sum by (instance) (peregrine_stubs_dead{@})", "{{instance}} dead"),
        ),
    ),
    Panel(
        "Started again, processes replaced",
        "short",
        (
            ("sum by (instance) (peregrine_restarts_total{@})", "{{instance}} started again"),
            ("sum by (instance) (peregrine_repairs_total{@})", "{{instance}} replaced"),
        ),
        "Since `serve` began. Its log says why.",
    ),
    Panel(
        "GPU",
        "percentunit",
        (("max by (instance, gpu_uuid) (nv_gpu_utilization{@})", "{{instance}} {{gpu_uuid}}"),),
    ),
    Panel(
        "Memory of the GPU",
        "bytes",
        (("max by (instance, gpu_uuid) (nv_gpu_memory_used_bytes{@})", "{{instance}} {{gpu_uuid}}"),),
    ),
)
DASHBOARDS = {
    "chain": ("Peregrine: the chain by step", CHAIN),
    "tiers": ("Peregrine: feature rows by tier", TIERS),
    "index": ("Peregrine: the index and its probe", INDEX),
    "route": ("Peregrine: the route by release", ROUTE),
    "capacity": ("Peregrine: capacity", CAPACITY),
}


def dashboard(uid: str, title: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    """Gives a dashboard as Grafana reads it, two panels a row."""
    return {
        "uid": f"peregrine-{uid}",
        "title": title,
        "tags": ["peregrine"],
        "schemaVersion": 39,
        "editable": False,
        "graphTooltip": 1,  # one cursor for all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [{"type": "dashboards", "tags": ["peregrine"], "title": "others", "keepTime": True}],
        "templating": {"list": [_chosen_datasource(), _chosen_instances()]},
        "panels": [_panel(number, one) for number, one in enumerate(panels)],
    }


def _chosen_datasource() -> dict[str, Any]:
    """Asks which Prometheus to read, where Grafana knows several."""
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _chosen_instances() -> dict[str, Any]:
    """Asks which instances to show; all at first."""
    return {
        "name": "instance",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": "label_values(peregrine_ready, instance)", "refId": "instances"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    """Gives one panel in its place."""
    row, column = divmod(number, _COLUMNS)
    targets = [
        {
            "refId": chr(ord("A") + place),
            "datasource": _DATASOURCE,
            "expr": expression.replace("@", 'instance=~"$instance"'),
            "legendFormat": legend,
        }
        for place, (expression, legend) in enumerate(panel.queries)
    ]
    drawn: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 10, "showPoints": "auto"}
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": drawn}
    if panel.is_stacked:
        drawn |= {"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}
    if panel.alert:
        drawn |= {"thresholdsStyle": {"mode": "dashed"}}
        defaults |= {"thresholds": thresholds(panel.alert)}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": f"{panel.text} {panel.alert} rings at the line.".strip()
        if panel.alert
        else panel.text,
        "datasource": _DATASOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
    }


def texts() -> dict[str, str]:
    """Gives each file's name and text."""
    return {
        f"{uid}.json": json.dumps(dashboard(uid, title, panels), indent=1, ensure_ascii=False) + "\n"
        for uid, (title, panels) in DASHBOARDS.items()
    }


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
