"""The whole job on real text in a few minutes: `python -m modellink.quickstart`, or `make quickstart`."""
