"""A backend that sends requests to a server (`coppice serve`), over TCP or a unix socket."""
