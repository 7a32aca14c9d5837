"""Mem-files: freeze, link, check, hash; capture of a guest on a private mapping; the real cost of a
guest's memory.

All functions block: callers in an event loop run them in a thread.
"""
