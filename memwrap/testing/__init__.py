"""The invariants: what is true of every memory, as tests that run on any that is installed.

    pytest --pyargs memwrap.testing --memory NAME

`families` builds tiny random models, `helpers` wraps and compares them, `test_*` hold the
invariants. They need the extra `testing` (pytest, hypothesis); nothing else in memwrap imports
this package.
"""
