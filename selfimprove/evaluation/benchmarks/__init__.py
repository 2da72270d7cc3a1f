"""Published benchmarks by name: each module reads that benchmark's files and gives its numbers, as JSON has them.

Every result names its file, its rows, the rows that were ignored with their reasons, and the fields it had no use for.
"""
