"""The HTTP server: the operations of `coppice.requests` over HTTP and WebSockets.

Litestar routes requests, validates bodies and serves the OpenAPI document; uvicorn speaks HTTP.
This package adds what Coppice needs: who may call what (`auth`), one open host per owner (`hosts`),
operations that outlive a connection (`running`), and the shape of errors (`failures`).
"""
