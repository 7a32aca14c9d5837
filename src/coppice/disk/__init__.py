"""Disk files: sparse and reflink clones, hard links with a declared fallback, and the overlay disks of instances.

Every function here is plain and blocking: callers on an event loop put it into a thread.
"""
