"""Write docs/static/explorer.html: one question's sweep, its two kinds of guidance side by side, as a page without a kernel."""

from pathlib import Path

from hyperlatent.viz.explorer import export_html
from hyperlatent.viz.explorer_engine import load_engine

PAGE = Path(__file__).resolve().parent.parent / "docs" / "static" / "explorer.html"

export_html(load_engine(), PAGE, question="what color is the object left of the diamond?", chains=16, method="both")
