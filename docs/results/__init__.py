"""Results of benchmarks: `data` chooses rows, `cells` writes them, `quality`, `speed` and `runs` make tables and plots.

The sentences around them are on the pages.
"""
