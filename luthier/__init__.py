"""Luthier's public Python interface: studies, their results, and the base class of strategies.

>>> from luthier import Study
>>> study = Study(
...     name="digits",
...     data={"source": "digits"},
...     model={"name": "digits_cnn"},
...     strategies=["linear_probe", "full"],
...     search={"trials": 12, "epochs": 4},
... )
>>> study.spec.search.trials
12

`study.plan()` shows what a run would do, `study.run()` runs it and returns its `Results`, and `study.results()` reads
them again later. Of the results, `results.best().model()` is the chosen `Model`, `results.predictions("daft", "test")`
a data frame, `results.plot.leaderboard()` a figure. `load(folder)` opens what `luthier export` has written, a `Model`
as well: `model.predict("pictures")`. Of segmentation studies both are a `SegmentationModel`, which predicts masks.
Names are imported on first use, so that `import luthier` takes neither torch nor ray. docs/python.md has more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.export.model import Model, load
    from orchestrator.export.segmentation_model import SegmentationModel
    from orchestrator.results.study_results import Results
    from orchestrator.study import Study
    from trainables.engine.contract import Strategy

    __version__: str

__all__ = ["Model", "Results", "SegmentationModel", "Strategy", "Study", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Called for names that the module has not (PEP 562): torch and ray are imported with the first that needs them.
    if name == "__version__":
        from importlib.metadata import version

        return version("luthier")
    if name == "Model":
        from orchestrator.export.model import Model

        return Model
    if name == "load":
        from orchestrator.export.model import load

        return load
    if name == "Results":
        from orchestrator.results.study_results import Results

        return Results
    if name == "SegmentationModel":
        from orchestrator.export.segmentation_model import SegmentationModel

        return SegmentationModel
    if name == "Strategy":
        from trainables.engine.contract import Strategy

        return Strategy
    if name == "Study":
        from orchestrator.study import Study

        return Study
    raise AttributeError(f"module 'luthier' has no attribute {name!r}. It has {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
