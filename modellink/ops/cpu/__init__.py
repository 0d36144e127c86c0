"""Forms for the CPU, where passes over memory that leave the cache are what an operation costs."""
