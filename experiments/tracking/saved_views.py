"""Saved views of a sweep in MLflow's UI: tables and curves, set up for it.

A saved view is an experiment tag in a format internal to MLflow (3.16 and later); a test pins it.
Without one a fresh browser shows one folded row, or ten of twelve curves.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.metrics import charted, columns

if TYPE_CHECKING:
    from experiments.tracking.sweep_view import ArmView, SweepView

MAIN = columns()
"""What a table shows of a run or arm: heading -> metric."""
TOKENS, GPU_HOURS = "train/tokens", "train/gpu_hours"
TAG = "mlflow.sharedViewState."
CHARTS = ("curves", "tokens", "gpu_hours", "by_arm", "differences")
TITLES = {
    "arms": "arms",
    "curves": "curves",
    "by_arm": "curves, mean of each arm",
    "tokens": "curves against tokens",
    "gpu_hours": "curves against GPU-hours",
    "differences": "what differs",
}
"""View -> title, in the order of the menu."""


def slug(sweep: str, view: str) -> str:
    """The view's key, in the tag and in links. MLflow takes no `=` in a tag's name."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', sweep)}.{view}"


def saved_views(view: SweepView, *, parent: str) -> dict[str, str]:
    """Experiment tag -> value of every saved view of the sweep with the MLflow run `parent`."""
    states = {
        "arms": _arms(view, parent),
        "curves": _curves(view, parent),
        "by_arm": _curves(view, parent, groupBy=BY_ARM),
        "tokens": _curves(view, parent, against=TOKENS),
        "gpu_hours": _curves(view, parent, against=GPU_HOURS),
        "differences": _differences(view, parent),
    }
    tags = {}
    for rank, (name, title) in enumerate(TITLES.items()):
        packed = base64.b64encode(zlib.compress(json.dumps(states[name]).encode())).decode()
        # The menu shows the newest first.
        made = int(view.created * 1000) - rank
        tags[TAG + slug(view.name, name)] = json.dumps(
            {"name": f"{view.name}: {title}", "createdAt": made, "state": f"deflate;{packed}"}
        )
    return tags


BY_ARM = {
    "aggregateFunction": "average",
    "groupByKeys": [{"mode": "tag", "groupByData": "arm_name"}],
}


def _state(**changes: Any) -> dict[str, Any]:
    """The UI's default state with `changes`; ordered by name, as order by creation folds runs."""
    return {
        "searchFilter": "",
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [],
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "viewMaximized": False,
        "runListHidden": False,
        "globalLineChartConfig": {
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
        },
        **changes,
    }


def _only(kind: str, parent: str) -> str:
    # An experiment may hold several sweeps.
    return f"tags.kind = '{kind}' and tags.`mlflow.parentRunId` = '{parent}'"


def _columns(names: Sequence[str], *, wide: int = 0) -> dict[str, Any]:
    texts = {f"tags.`{title}`" for title in MAIN}
    widths = {n: 190 if n.startswith("metrics") or n in texts else 120 for n in names}
    return {
        "selectedColumns": list(names),
        "columnOrder": list(names),
        "columnWidths": {**widths, **({names[0]: wide} if wide else {})},
    }


def _charts(
    charts: Sequence[Mapping[str, Any]], *, title: str, columns: int = 2, height: int = 380
) -> dict[str, Any]:
    """The charts in a section of their own, `columns` beside each other."""
    section = {
        "uuid": "main",
        "name": title,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        "columns": columns,
        "cardHeight": height,
    }
    made = [
        {
            "uuid": f"chart{number}",
            "metricSectionId": "main",
            "deleted": False,
            "isGenerated": False,
            **chart,
        }
        for number, chart in enumerate(charts)
    ]
    return {"compareRunSections": [section], "compareRunCharts": made}


def _arms(view: SweepView, parent: str) -> dict[str, Any]:
    shown = [f"{m}_{p}" for p in ("mean", "ci_low", "ci_high") for m in MAIN.values()]
    columns = [f"params.`{key}`" for key in axis_keys(view.arms)]
    columns += [f"tags.`{tag}`" for tag in ("finished", *MAIN)]  # means with intervals, as text
    columns += [f"metrics.`{key}`" for key in shown]  # to sort by
    bars = [
        {"type": "BAR", "metricKey": f"{metric}_mean", "runsCountToCompare": 100}
        for metric in MAIN.values()
    ]
    return _state(
        searchFilter=_only("arm", parent),
        **_columns(columns),
        **_charts(bars, title="Means"),
    )


def _curves(
    view: SweepView, parent: str, *, against: str = "", groupBy: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The charted metrics of every run against the step, or against the metric `against`."""
    axis = {"xAxisKey": "metric" if against else "step", "selectedXAxisMetricKey": against}
    lines = [
        {
            "type": "LINE",
            "metricKey": metric.key,
            "selectedMetricKeys": [metric.key],
            "runsCountToCompare": max(20, sum(len(arm.runs) for arm in view.arms)),
            "lineSmoothness": 0,
            "scaleType": metric.scale,
            "xAxisScaleType": "linear",
            "range": {},
            **axis,
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "ignoreOutliers": False,
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
        }
        for metric in charted()
    ]
    columns = [f"params.`{key}`" for key in axis_keys(view.arms)]
    columns += ["tags.`seed`", "tags.`state`", *(f"metrics.`{m}`" for m in MAIN.values())]
    return _state(
        searchFilter=_only("run", parent),
        groupBy=groupBy,
        globalLineChartConfig={"lineSmoothness": 0, **axis},
        **_columns(columns),
        **_charts(lines, title="Curves"),
    )


def _differences(view: SweepView, parent: str) -> dict[str, Any]:
    card = {
        "type": "DIFFERENCE",
        "compareGroups": ["Parameters", "Tags"],
        "chartName": "What differs",
        "showChangeFromBaseline": True,
        "showDifferencesOnly": True,
        "baselineColumnUuid": "",
        "runsCountToCompare": max(20, len(view.arms)),
    }
    return _state(
        searchFilter=_only("arm", parent),
        **_columns([f"params.`{key}`" for key in axis_keys(view.arms)] + ["tags.`finished`"]),
        **_charts([card], title="What differs", columns=1, height=640),
    )


def axis_keys(arms: Sequence[ArmView]) -> list[str]:
    """What varies between the arms, in the order of their names."""
    return list(dict.fromkeys(key for arm in arms for key in arm.axes))
