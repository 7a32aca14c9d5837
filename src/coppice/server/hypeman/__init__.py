"""The routes of the hypeman API, so that its official clients drive Coppice unchanged.

Paths, bodies, statuses and names are those of hypeman's OpenAPI document and of its SDK 0.28. States
are spelled alike; `Template` is Coppice's own. Each route makes one request of `coppice.requests`.
"""
