"""Mem-files: freeze, link, check, hash; capture of a guest on a private mapping; what a guest's memory really costs.

Every function here is plain and blocking: callers on an event loop put it into a thread.
"""
