"""Benchmarks of forks and captures, compared with the same machine without Coppice. Run as `python
-m bench`.

One run on one host measures all methods in turns. Times differ between hosts; compare ratios within
a run.
"""
