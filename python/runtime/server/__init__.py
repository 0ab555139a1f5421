"""The HTTP side: an OpenAI-compatible API over runtime.front, as an ASGI app."""
