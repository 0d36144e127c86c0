"""A stand-in for MindSpeed, which is not on PyPI and compiles its operators with CANN: the function that we call."""
