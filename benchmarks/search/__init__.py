"""Searches replayed on landscapes: which sampler, scheduler and division of the budget finds the best configuration.

    python -m benchmarks.search                                  the table of docs/search.md, for hours
    python -m benchmarks.search --repeats 20 --budgets 12 24     a look, in minutes

A landscape (`benchmarks/landscapes/tables`) has learning curves of a random design of every strategy's search space. On
it a model of each strategy is fitted (`surrogate`), which answers what a configuration would have done, noise between
seeds included. A search (`replay`) asks a policy (`policies`) for configurations (`samplers`), stops or pauses trials
by its scheduler's rule (`schedulers`), confirms each strategy's best on three seeds and names a winner. A warm start
(`warm`) comes from the landscapes that are not searched. Samplers, allocation, rungs and promotions are the product's
own code.
"""
