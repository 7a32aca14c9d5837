"""Benchmarks of what Coppice claims: what a fork and a capture cost, beside what the same machine costs without Coppice.

All methods are measured in one run, interleaved, on one host. Absolute times are this host's; the ratios within a run are the claims.
"""
