"""The verbs of ``navil-megatron``: for each its words, its options and its report. ``cli.py`` runs and prints them.

At import a verb is data. What it works with is imported when it runs, so that ``--help`` and ``doctor`` answer at once,
on a broken install and on an old Python.
"""
