"""Writes the table of SKUs in plan.md anew: `python docs/plan_table.py`.

The machine's own line, `cpu`, is left out: it differs from machine to machine.
"""

from __future__ import annotations

import re
from pathlib import Path

from twotower_contract.skus import known_skus
from twotower_engines.planning.model_size import read_model_size
from twotower_engines.planning.plan import PlanRequest
from twotower_engines.planning.plan_report import plan_report, with_faster_flavours
from twotower_engines.planning.plan_text import text_of_many

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "plan.md"
BLOCK = re.compile(r"(?<=```\n)63\.19 B parameters.*?(?=\n\nWhat would fit|\n```)", re.DOTALL)
THRESHOLD = 0.9


def table() -> str:
    """Return the table and its legend, as `twotower plan --sku all` prints them."""
    model = read_model_size()
    skus = [sku for name, sku in known_skus().items() if name != "cpu"]
    requests = [PlanRequest(sku, flavour=one) for sku in skus for one in sku.flavours]
    reports = [plan_report(model, request, THRESHOLD) for request in requests]
    default = [plan_report(model, PlanRequest(sku), THRESHOLD) for sku in skus]
    text = text_of_many(with_faster_flavours(default, reports))
    return text.split("\n\nWhat would fit")[0]


def main() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    made, count = BLOCK.subn(lambda match: table(), page)
    if count != 1:
        raise SystemExit(f"{PAGE}: has {count} tables of SKUs, not one")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
